"""Trains a denoising diffusion model (Ho et al. 2020) and saves it as a pipeline folder: `unet/` and `scheduler/`.

    accelerate launch training/train_ddpm.py
    accelerate launch training/train_ddpm.py --config training/recipes/mnist-ddpm.yaml --dataset_name ylecun/mnist

After `import hfdiff`, the folder opens with `diffusers.DDPMPipeline.from_pretrained`.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusers import DDPMPipeline, UNet2DModel
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from hfdiff.schedulers.scheduling_ddpm import LEARNED_VARIANCES, DDPMScheduler
from hfdiff.training.card import Measurement, find_repository, publish, write_card
from hfdiff.training.checkpoints import placed
from hfdiff.training.config import parse_settings
from hfdiff.training.data import Batch, BatchStream, LabelledImages, load_training_data
from hfdiff.training.images import Augmentation
from hfdiff.training.log import VALIDATION
from hfdiff.training.loop import make_accelerator, train
from hfdiff.training.losses import VLB_WEIGHT, LossType, check_objective, ddpm_losses, weighted_mean
from hfdiff.training.monitor import BOUND_TERMS, MonitorSettings, grid_path, make_monitor
from hfdiff.training.process import on_main, run_script
from hfdiff.training.timesteps import LossSecondMomentSampler

USAGE = """import hfdiff
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{folder}")
image = pipe(num_inference_steps={steps}).images[0]"""
USAGE_CONDITIONAL = """from diffusers import DDPMPipeline
from hfdiff.training.samples import draw_images

pipe = DDPMPipeline.from_pretrained("{folder}")
images = draw_images(pipe.unet, pipe.scheduler, {classes}, {steps})  # bytes, (N, C, H, W), one of each class"""


@dataclass(kw_only=True)
class DDPMSettings(MonitorSettings):
    """Settings of a diffusion model's training.

    Args:
        label_column: the dataset's column of labels, for a class-conditional model.
        class_conditional: train one model of all classes that is told which to draw.
        block_out_channels: widths of the UNet, one per level; each level after the first halves height and width.
        layers_per_block: residual blocks per level.
        attention: levels with attention, from 0 for the images' own size; negative numbers count from the last.
        norm_num_groups: groups of each group normalisation.
        attention_head_dim: channels per attention head.
        dropout: dropout probability in residual blocks.
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

    output_dir: str = "out/digits-ddpm"
    max_train_steps: PositiveInt = 800
    learning_rate: PositiveFloat = 2e-3
    label_column: str = "label"
    class_conditional: bool = False
    block_out_channels: tuple[PositiveInt, ...] = (16, 32)
    layers_per_block: PositiveInt = 1
    attention: tuple[int, ...] = (-1,)
    norm_num_groups: PositiveInt = 8
    attention_head_dim: PositiveInt = 16
    dropout: ClosedUnitInterval = 0.0
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
        self._check_unet()
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

    def _check_unet(self) -> None:
        levels = len(self.block_out_channels)
        if not all(-levels <= level < levels for level in self.attention):
            raise ValueError(f"`attention` must name levels from {-levels} to {levels - 1}, got {self.attention}.")
        for width in self.block_out_channels:
            if width % self.norm_num_groups or width == self.norm_num_groups:
                raise ValueError(
                    f"`norm_num_groups` must divide every width with at least 2 channels per group, since one alone "
                    f"normalises the time embedding away, got {self.norm_num_groups} for {width} channels; lower it."
                )
        for level in {*self.attention, -1}:  # the middle block attends, too
            if self.block_out_channels[level] % self.attention_head_dim:
                raise ValueError(
                    f"`attention_head_dim` must divide the widths with attention, got {self.attention_head_dim} for "
                    f"{self.block_out_channels[level]} channels; lower it."
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
    channels, size = data.images.shape[1:3]
    levels = len(settings.block_out_channels)
    if size % 2 ** (levels - 1):
        raise ValueError(
            f"`resolution` must be a multiple of {2 ** (levels - 1)} for {levels} levels, got {size}; "
            "give another, or fewer `block_out_channels`."
        )
    attends = [level in settings.attention or level - levels in settings.attention for level in range(levels)]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=2 * channels if settings.variance_type in LEARNED_VARIANCES else channels,
        block_out_channels=settings.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        layers_per_block=settings.layers_per_block,
        norm_num_groups=settings.norm_num_groups,
        attention_head_dim=settings.attention_head_dim,
        dropout=settings.dropout,
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

    monitor = make_monitor(settings, accelerator, unet, scheduler, losses, data, validation)
    train(settings, accelerator, unet, batches, loss, stateful=[sampler] if sampler else [], monitor=monitor)
    if accelerator.is_main_process:
        finish(settings, unet, scheduler, data, validation, repository)


def finish(
    settings: DDPMSettings,
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    data: LabelledImages,
    validation: LabelledImages | None,
    repository: str | None,
) -> None:
    """Saves the pipeline, its last grid and its card, and publishes them where a repository is named."""
    usage = USAGE_CONDITIONAL if settings.class_conditional else USAGE
    measured = json.loads(Path(settings.output_dir, VALIDATION).read_text().splitlines()[-1])
    with placed(settings.output_dir) as folder:
        DDPMPipeline(unet, scheduler).save_pretrained(folder)
        if settings.sample_images:
            shutil.copy(grid_path(Path(settings.output_dir), measured["step"]), folder / "samples.png")
        write_card(
            folder,
            title="Denoising diffusion model",
            settings=settings,
            data=data,
            numbers=describe_numbers(measured, settings, validation),
            usage=usage.format(
                folder=repository or settings.output_dir,
                steps=min(settings.sample_steps, len(scheduler)),
                classes=len(data.label_names),
            ),
            tags=["ddpm"],
        )
    if repository:
        publish(settings.output_dir, repository)


def describe_numbers(
    measured: dict[str, float], settings: DDPMSettings, validation: LabelledImages | None
) -> list[Measurement]:
    """The last validation's numbers, and on what they were measured."""
    count = len(validation.images) if validation else 0
    descriptions = {
        "validation_loss": (
            f"{settings.loss_type} loss of held-out images",
            f"{min(count, settings.validation_images)} held-out images, each at one timestep",
        ),
        "bits_per_dim": (
            "variational bound (bits per dimension)",
            f"{min(count, settings.bits_per_dim_images)} held-out images, {BOUND_TERMS} terms of "
            f"{settings.num_train_timesteps}, the others interpolated",
        ),
        "frechet_distance": (
            "Fréchet distance to the dataset",
            f"{settings.fid_images} drawn images, {settings.sample_steps} steps, features of {settings.fid_features}",
        ),
    }
    return [
        Measurement(name, measured[key], provenance)
        for key, (name, provenance) in descriptions.items()
        if key in measured
    ]


if __name__ == "__main__":
    run_script(main)
