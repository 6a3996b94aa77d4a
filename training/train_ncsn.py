"""Trains a noise conditional score network (Song & Ermon 2019, 2020) and saves it as a pipeline folder.

    accelerate launch training/train_ncsn.py
    accelerate launch training/train_ncsn.py --config training/recipes/mnist-ncsn.yaml --dataset_name ylecun/mnist

The folder, with `unet/` and `scheduler/`, opens with `hfdiff.NCSNPipeline.from_pretrained`. The techniques named below
are those of Song & Ermon 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffusers import ModelMixin
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Generator, Tensor, nn

from hfdiff.data.labelled import LabelledImages
from hfdiff.data.process import is_first_process, on_main, run_script
from hfdiff.models.ncsn import NCSNModel
from hfdiff.models.ncsnv2 import NCSNv2Model
from hfdiff.pipelines.pipeline_ncsn import NCSNPipeline
from hfdiff.schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from hfdiff.training.augmentation import Augmentation
from hfdiff.training.batches import Batch, BatchStream, load_training_data
from hfdiff.training.card import find_repository
from hfdiff.training.config import parse_settings
from hfdiff.training.finish import common_measures, finish
from hfdiff.training.levels import choose_levels, sampling_reasons
from hfdiff.training.loop import make_accelerator, train
from hfdiff.training.losses import score_matching_losses
from hfdiff.training.monitor import MonitorSettings, make_monitor
from hfdiff.training.samples import draw_by_langevin
from hfdiff.training.unet import UNetSettings, build_unet

USAGE = """from hfdiff import NCSNPipeline

pipe = NCSNPipeline.from_pretrained("{folder}")
image = pipe(num_inference_steps={steps}).images[0]"""


@dataclass(kw_only=True)
class NCSNSettings(UNetSettings, MonitorSettings):
    """Settings of a score network's training.

    Args:
        architecture: "unet" (diffusers' UNet2DModel, given x_t/√(1+σ²)), or the papers' RefineNets, "ncsn" and
            "ncsnv2".
        model_channels: base width of the RefineNets.
        prediction_type: what the UNet predicts, and its score is computed from; a RefineNet predicts the score.
        sigma_min: the smallest noise level, for images in [-1, 1].
        sigma_max: the largest, or "auto": the largest distance between two images of the dataset (technique 1).
        num_levels: L, or "auto": as many as keep each level within reach of the next (technique 2).
        steps_per_level: T, Langevin updates per level in sampling, for which the step size is solved (technique 4).
        sampling: the saved scheduler's: "langevin", "consistent" or "predictor_corrector".
    """

    output_dir: str = "out/digits-ncsn"
    max_train_steps: PositiveInt = 800
    learning_rate: PositiveFloat = 2e-3
    sample_steps: PositiveInt = 250
    architecture: Literal["unet", "ncsn", "ncsnv2"] = "unet"
    model_channels: PositiveInt = 32
    prediction_type: Literal["score", "epsilon", "sample", "v_prediction"] = "v_prediction"
    sigma_min: PositiveFloat = 0.02
    sigma_max: PositiveFloat | Literal["auto"] = "auto"
    num_levels: PositiveInt | Literal["auto"] = "auto"
    steps_per_level: PositiveInt = 2
    sampling: Literal["langevin", "consistent", "predictor_corrector"] = "consistent"


def make_scheduler(settings: NCSNSettings, data: LabelledImages) -> AnnealedLangevinScheduler:
    """The noise levels to train on, chosen from the dataset where the settings say "auto"; prints why.

    Raises:
        ValueError: for levels out of their range, or too few `sample_steps` for them.
    """
    levels = choose_levels(data, settings.sigma_min, settings.sigma_max, settings.num_levels)
    unet = settings.architecture == "unet"
    scheduler = AnnealedLangevinScheduler(
        num_train_timesteps=levels.num_levels,
        sigma_min=settings.sigma_min,
        sigma_max=levels.sigma_max,
        steps_per_level=settings.steps_per_level,
        sampling=settings.sampling,
        prediction_type=settings.prediction_type if unet else "score",
        scale_input=unet,
    )
    if is_first_process():
        print(*levels.reasons, *sampling_reasons(scheduler, settings), sep="\n", flush=True)
    scheduler.set_timesteps(settings.sample_steps)  # an error now, not after the training
    return scheduler


def make_model(settings: NCSNSettings, scheduler: AnnealedLangevinScheduler, data: LabelledImages) -> ModelMixin:
    """The score network for a dataset's images, in [-1, 1].

    Raises:
        ValueError: for images that the network cannot halve as often as it has levels.
    """
    if settings.architecture == "unet":
        return build_unet(settings, data)
    network = {"ncsn": NCSNModel, "ncsnv2": NCSNv2Model}[settings.architecture]
    return network(
        sample_size=data.images.shape[2],
        in_channels=data.images.shape[1],
        model_channels=settings.model_channels,
        num_levels=len(scheduler),
        sigma_min=scheduler.config.sigma_min,
        sigma_max=scheduler.config.sigma_max,
        rescaled=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script with the given flags, or those of the process."""
    settings = parse_settings(NCSNSettings, argv, __doc__ or "")
    data, validation = load_training_data(settings)
    accelerator = make_accelerator(settings)
    scheduler = make_scheduler(settings, data)
    model = make_model(settings, scheduler, data)
    batch_size = settings.train_batch_size * accelerator.num_processes
    augmentation = Augmentation(not settings.center_crop, settings.random_flip)
    batches = BatchStream(data, batch_size, len(scheduler), settings.seed, augmentation)
    repository = on_main(accelerator, lambda: find_repository(settings))

    def losses(model: nn.Module, x0: Tensor, timestep: Tensor, noise: Tensor, labels: None) -> Tensor:
        return score_matching_losses(model, scheduler, x0, timestep, noise) / x0[0].numel()  # for any size of image

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return losses(model, batch.x0, batch.timestep, batch.noise, None).mean()

    def draw(count: int, generator: Generator) -> Tensor:
        return draw_by_langevin(model, scheduler, count, settings.sample_steps, generator)

    monitor = make_monitor(settings, accelerator, model, len(scheduler), losses, draw, data, validation)
    train(settings, accelerator, model, batches, loss, monitor=monitor)
    if accelerator.is_main_process:
        finish(
            settings,
            NCSNPipeline(model, scheduler),
            data,
            title="Noise conditional score network",
            usage=USAGE.format(folder="{folder}", steps=settings.sample_steps),
            tag="ncsn",
            measures=common_measures(settings, validation, "score matching"),
            repository=repository,
        )


if __name__ == "__main__":
    run_script(main)
