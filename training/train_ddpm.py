"""Trains a denoising diffusion model (Ho et al. 2020) and saves it as a pipeline folder: `unet/` and `scheduler/`.

    accelerate launch training/train_ddpm.py
    accelerate launch training/train_ddpm.py --config training/recipes/mnist-ddpm.yaml --dataset_name ylecun/mnist

After `import hfdiff`, the folder opens with `diffusers.DDPMPipeline.from_pretrained`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from diffusers import DDPMPipeline, UNet2DModel
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Generator, Tensor, nn

from hfdiff.data.labelled import LabelledImages
from hfdiff.data.process import on_main, run_script
from hfdiff.schedulers.scheduling_ddpm import LEARNED_VARIANCES, DDPMScheduler
from hfdiff.training.augmentation import Augmentation
from hfdiff.training.batches import Batch, BatchStream, load_training_data
from hfdiff.training.card import find_repository
from hfdiff.training.config import parse_settings
from hfdiff.training.finish import common_measures, finish
from hfdiff.training.loop import make_accelerator, train
from hfdiff.training.losses import VLB_WEIGHT, LossType, check_objective, ddpm_losses, weighted_mean
from hfdiff.training.monitor import BOUND_TERMS, MonitorSettings, first_images, held_out_bound, make_monitor
from hfdiff.training.samples import draw_images
from hfdiff.training.timesteps import LossSecondMomentSampler
from hfdiff.training.unet import UNetSettings, build_unet

USAGE = """import hfdiff
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{folder}")
image = pipe(num_inference_steps={steps}).images[0]"""
USAGE_CONDITIONAL = """from diffusers import DDPMPipeline
from hfdiff.training.samples import draw_images

pipe = DDPMPipeline.from_pretrained("{folder}")
images = draw_images(pipe.unet, pipe.scheduler, {classes}, {steps})  # bytes, (N, C, H, W), one of each class"""


@dataclass(kw_only=True)
class DDPMSettings(UNetSettings, MonitorSettings):
    """Settings of a diffusion model's training.

    Args:
        bits_per_dim_images: images of the validation data, at most, whose variational bound is measured; 0 measures
            none.
        label_column: the dataset's column of labels, for a class-conditional model.
        class_conditional: train one model of all classes that is told which to draw.
        num_train_timesteps: T, length of the chain.
        beta_schedule: the noise levels, by a name of hfdiff.schedulers.noise.make_betas.
        beta_start: their first β, where the schedule has one.
        beta_end: their last β, where the schedule has one.
        prediction_type: what the UNet predicts: the noise, x_0 or v.
        variance_type: the variance of a reverse step; "learned_range" and "learned" are the UNet's to predict.
        loss_type: "simple", "vlb", the variational bound, or "hybrid", both, the bound for a learned variance alone.
        vlb_weight: of the bound in the hybrid loss.
        snr_gamma: weight the simple loss by min-SNR-γ with this γ.
        time_sampling: "uniform", or "loss-second-moment", which draws timesteps of large losses more often.
    """

    may_change: ClassVar[frozenset[str]] = MonitorSettings.may_change | {"bits_per_dim_images"}

    output_dir: str = "out/digits-ddpm"
    bits_per_dim_images: NonNegativeInt = 100
    max_train_steps: PositiveInt = 800
    learning_rate: PositiveFloat = 2e-3
    label_column: str = "label"
    class_conditional: bool = False
    num_train_timesteps: PositiveInt = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    beta_start: PositiveFloat = 1e-4
    beta_end: PositiveFloat = 0.02
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = "fixed_small"
    loss_type: LossType = "simple"
    vlb_weight: NonNegativeFloat = VLB_WEIGHT
    snr_gamma: PositiveFloat | None = None
    time_sampling: Literal["uniform", "loss-second-moment"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_objective(self.loss_type, self.variance_type, self.prediction_type, self.snr_gamma)
        if self.loss_type == "simple" and self.variance_type in LEARNED_VARIANCES:
            raise ValueError(
                f'`loss_type` "simple" does not train a variance of type {self.variance_type!r}; use "hybrid" or '
                '"vlb", or a fixed `variance_type`.'
            )
        if self.prediction_type == "epsilon" and not make_scheduler(self).alphas_cumprod[-1]:
            raise ValueError(
                f"`prediction_type` must not be 'epsilon' for `beta_schedule` {self.beta_schedule!r}, which ends in "
                "pure noise, where noise says nothing of x_0; use 'v_prediction' or 'sample'."
            )


def make_scheduler(settings: DDPMSettings) -> DDPMScheduler:
    """The chain to train.

    Raises:
        ValueError: for an unknown schedule, or β outside (0, 1].
    """
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "variance_type")
    scheduler = DDPMScheduler(**{name: getattr(settings, name) for name in names})
    if not ((scheduler.betas > 0) & (scheduler.betas <= 1)).all():
        raise ValueError(
            f"`beta_start` and `beta_end` must give β in (0, 1], got {settings.beta_start} and {settings.beta_end}, "
            f"with β up to {scheduler.betas.max():g}; lower them."
        )
    return scheduler


def make_unet(settings: DDPMSettings, data: LabelledImages) -> UNet2DModel:
    """The UNet for a dataset's images (N, C, H, W), and its classes, where it is told them.

    Raises:
        ValueError: when the images cannot be halved once per level.
    """
    return build_unet(
        settings,
        data,
        outputs=2 if settings.variance_type in LEARNED_VARIANCES else 1,
        num_class_embeds=len(data.label_names) if settings.class_conditional else None,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script with the given flags, or those of the process."""
    settings = parse_settings(DDPMSettings, argv, __doc__ or "")
    data, validation = load_training_data(settings, settings.label_column if settings.class_conditional else None)
    if not settings.class_conditional:
        data, validation = (found and found._replace(labels=None) for found in (data, validation))
    accelerator = make_accelerator(settings)
    scheduler, unet = make_scheduler(settings), make_unet(settings, data)
    sampler = LossSecondMomentSampler(len(scheduler)) if settings.time_sampling == "loss-second-moment" else None
    batch_size = settings.train_batch_size * accelerator.num_processes
    augmentation = Augmentation(not settings.center_crop, settings.random_flip)
    batches = BatchStream(data, batch_size, len(scheduler), settings.seed, augmentation, sampler)
    repository = on_main(accelerator, lambda: find_repository(settings))

    def losses(model: nn.Module, x0: Tensor, timestep: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        options = {name: getattr(settings, name) for name in ("loss_type", "snr_gamma", "vlb_weight")}
        return ddpm_losses(model, scheduler, x0, timestep, noise, class_labels=labels, **options)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        values = losses(model, batch.x0, batch.timestep, batch.noise, batch.labels)
        if sampler:
            sampler.update(*accelerator.gather((batch.timestep, values.detach())))
        return weighted_mean(values, batch.weight)

    def draw(count: int, generator: Generator) -> Tensor:
        return draw_images(unet, scheduler, count, settings.sample_steps, generator)

    bound = None
    if validation and settings.bits_per_dim_images:
        held_out = first_images(validation, settings.bits_per_dim_images)
        bound = partial(held_out_bound, unet, scheduler, held_out, settings.seed)
    monitor = make_monitor(settings, accelerator, unet, len(scheduler), losses, draw, data, validation, bound)
    train(settings, accelerator, unet, batches, loss, stateful=[sampler] if sampler else [], monitor=monitor)
    if not accelerator.is_main_process:
        return
    measures = common_measures(settings, validation, settings.loss_type)
    if validation:
        count = min(len(validation.images), settings.bits_per_dim_images)
        measures["bits_per_dim"] = (
            "variational bound (bits per dimension)",
            f"{count} held-out images, {BOUND_TERMS} terms of {len(scheduler)}, the others interpolated",
        )
    finish(
        settings,
        DDPMPipeline(unet, scheduler),
        data,
        title="Denoising diffusion model",
        usage=describe_usage(settings, scheduler, data),
        tag="ddpm",
        measures=measures,
        repository=repository,
    )


def describe_usage(settings: DDPMSettings, scheduler: DDPMScheduler, data: LabelledImages) -> str:
    """Code that loads the pipeline of a `{folder}`."""
    usage = USAGE_CONDITIONAL if settings.class_conditional else USAGE
    steps = min(settings.sample_steps, len(scheduler))
    return usage.format(folder="{folder}", steps=steps, classes=len(data.label_names))


if __name__ == "__main__":
    run_script(main)
