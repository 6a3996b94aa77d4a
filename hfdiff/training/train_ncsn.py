"""Training of a noise conditional score network (Song & Ermon 2019, 2020), saved as a pipeline folder.

The folder, with `unet/` and `scheduler/`, opens with `hfdiff.NCSNPipeline.from_pretrained`. The techniques named below
are those of Song & Ermon 2020.
"""

import copy

from diffusers import ModelMixin
from torch import Tensor, nn

from ..data.labelled import LabelledImages
from ..data.process import is_first_process, on_main
from ..models.ncsn import NCSNModel
from ..models.ncsnv2 import NCSNv2Model
from ..pipelines.pipeline_ncsn import NCSNPipeline
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from .augmentation import Augmentation
from .batches import Batch, derive_seed, load_training_data, make_batches
from .card import find_repository
from .diffusion_model import DiffusionModel, open_diffusion_model, take_over
from .finish import common_measures, finish
from .levels import choose_levels, sampling_reasons
from .loop import make_accelerator, train
from .losses import score_matching_losses
from .monitor import make_monitor
from .samples import draw_images
from .settings import NCSNSettings
from .unet import build_unet

USAGE = """from hfdiff import NCSNPipeline

pipe = NCSNPipeline.from_pretrained("{folder}")
image = pipe(num_inference_steps={steps}).images[0]"""


def run(settings: NCSNSettings) -> None:
    """Trains the network of the settings, measures and saves it."""
    start = open_diffusion_model(settings.init_from, "init_from") if settings.init_from else None
    if start:
        settings = take_over(settings, "init_from", tell(start, settings))
    data, validation = load_training_data(settings, channels=start and start.channels)
    accelerator = make_accelerator(settings)
    scheduler = make_scheduler(settings, data, start)
    model = make_model(settings, scheduler, data, start)
    augmentation = Augmentation(not settings.center_crop, settings.random_flip)
    batches = make_batches(settings, data, len(scheduler), accelerator.num_processes, augmentation=augmentation)
    repository = on_main(accelerator, lambda: find_repository(settings))
    pipe = NCSNPipeline(model, copy.copy(scheduler))

    def losses(model: nn.Module, x0: Tensor, timestep: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        return score_matching_losses(model, scheduler, x0, timestep, noise) / x0[0].numel()  # for any size of image

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return losses(model, batch.x0, batch.timestep, batch.noise, None).mean()

    def draw(count: int) -> Tensor:
        return draw_images(pipe, count, settings.sample_steps, derive_seed(settings.seed, "samples", 0))

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


def tell(start: DiffusionModel, settings: NCSNSettings) -> dict[str, object]:
    """The settings that a score network to start from says.

    Raises:
        ValueError: for a model of another family.
    """
    scheduler = start.scheduler
    if not isinstance(scheduler, AnnealedLangevinScheduler) or scheduler.config.sigma_schedule != "geometric":
        raise ValueError(
            f"`init_from` must be a score network with its noise levels, got {type(start.unet).__name__} with "
            f"{type(scheduler).__name__} in {settings.init_from!r}; a diffusion model starts `hfdiff train ddpm`."
        )
    names = ("sigma_min", "sigma_max", "steps_per_level")
    told: dict[str, object] = {name: scheduler.config[name] for name in names}
    told["num_levels"] = len(scheduler)
    told["resolution"] = settings.resolution or start.size
    return told


def make_scheduler(
    settings: NCSNSettings, data: LabelledImages, start: DiffusionModel | None = None
) -> AnnealedLangevinScheduler:
    """The noise levels of the model to start from, else the settings', chosen from the dataset where they say "auto".

    Raises:
        ValueError: for levels out of their range, or too few `sample_steps` for them.
    """
    if start:
        assert isinstance(start.scheduler, AnnealedLangevinScheduler)
        return start.scheduler
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


def make_model(
    settings: NCSNSettings,
    scheduler: AnnealedLangevinScheduler,
    data: LabelledImages,
    start: DiffusionModel | None = None,
) -> ModelMixin:
    """The score network for a dataset's images, in [-1, 1], or the one to start from.

    Raises:
        ValueError: for images that the network cannot halve as often as it has levels, or of other channels.
    """
    if start:
        if start.channels != data.images.shape[1]:
            raise ValueError(
                f"`init_from` must have the dataset's {data.images.shape[1]} channels, got {start.channels}; start "
                "from another model."
            )
        start.unet.register_to_config(sample_size=data.images.shape[2])
        return start.unet
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
