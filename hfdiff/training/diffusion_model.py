"""A model to guide, or to start from, of either family: its network, its noise levels, and what else it tells."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffusers import ModelMixin, UNet2DModel

from ..data.sources import reading_model
from ..models.adm_unet import ADMUNet
from ..models.ncsn import NCSNModel
from ..models.ncsnv2 import NCSNv2Model
from ..pipelines.hub_download import fetch
from ..pipelines.outputs import draws_from_zero
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..schedulers.scheduling_ddpm import DDPMScheduler
from .config import TrainingSettings

BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
SIGMAS = ("num_train_timesteps", "sigma_schedule", "sigma_min", "sigma_max", "scale_input")
NETWORKS = {kind.__name__: kind for kind in (UNet2DModel, ADMUNet, NCSNModel, NCSNv2Model)}
INDEX, CONFIG = "model_index.json", "config.json"

Levels = DDPMScheduler | AnnealedLangevinScheduler
Settings = TypeVar("Settings", bound=TrainingSettings)


class DiffusionModel(NamedTuple):
    """What a folder holds.

    Args:
        unet: the network.
        scheduler: its noise levels; None for the folder of a network alone.
        id2label: names of its classes; empty where it has none.
    """

    unet: ModelMixin
    scheduler: Levels | None
    id2label: dict[int, str]

    @property
    def channels(self) -> int:
        """Of its images."""
        return self.unet.config["in_channels"]

    @property
    def size(self) -> int:
        """Height and width of its images."""
        size = self.unet.config["sample_size"]
        return size if isinstance(size, int) else size[0]


def open_diffusion_model(source: str, argument: str = "diffusion_model") -> DiffusionModel:
    """The network, and where it has them the noise levels, of a folder or Hub id, of the DDPM or the NCSN family.

    Args:
        source: a pipeline, or a network alone.
        argument: the setting that names it.

    Raises:
        ValueError: when it is not there, or its data are not in [-1, 1].
    """
    with reading_model(argument, source):
        folder = model_folder(source)
        if not (folder / INDEX).is_file() and (folder / CONFIG).is_file():
            return DiffusionModel(_kind(UNet2DModel.load_config(folder)).from_pretrained(folder), None, {})
        kind = _kind(UNet2DModel.load_config(folder, subfolder="unet"))
        network = kind.from_pretrained(folder, subfolder="unet")
        levels = DDPMScheduler.load_config(folder, subfolder="scheduler")  # of any scheduler
        langevin = levels["_class_name"] == AnnealedLangevinScheduler.__name__
        scheduler = (AnnealedLangevinScheduler if langevin else DDPMScheduler).from_pretrained(
            folder, subfolder="scheduler"
        )
        names = ClassifierGuidedPipeline.load_config(folder).get("id2label") or {}
    if draws_from_zero(network):
        raise ValueError(f"`{argument}` must have data in [-1, 1], got one in [0, 1], {source!r}; use another.")
    return DiffusionModel(network, scheduler, {int(index): name for index, name in names.items()})


def model_folder(source: str) -> Path:
    """The folder of a local or published pipeline, or of a model of its own.

    Raises:
        OSError: when it is not there.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(fetch(source))
    except FileNotFoundError:
        return Path(fetch(source, index=CONFIG))


def _kind(config: dict[str, Any]) -> type[ModelMixin]:
    """The class of a network, of its config."""
    return NETWORKS.get(config["_class_name"], UNet2DModel)


def noise_schedule(scheduler: Levels) -> dict[str, Any]:
    """The entries of a scheduler's config that make its noise levels, as a classifier's config holds them."""
    names = SIGMAS if scheduler.config.get("sigma_schedule") == "geometric" else BETAS
    return {name: scheduler.config[name] for name in names}


def make_levels(schedule: dict[str, Any]) -> Levels:
    """The noise levels of such entries; those that are left out have their scheduler's defaults."""
    return AnnealedLangevinScheduler(**schedule) if "sigma_schedule" in schedule else DDPMScheduler(**schedule)


def take_over(settings: Settings, argument: str, told: dict[str, Any]) -> Settings:
    """The settings with what a model tells of itself; what was given otherwise is refused.

    Args:
        settings: of the run.
        argument: the setting that names the model.
        told: settings as the model has them.

    Raises:
        ValueError: for a setting that is neither its default nor the model's.
    """
    for name, value in told.items():
        given = getattr(settings, name)
        if given not in (value, type(settings).__dataclass_fields__[name].default):
            raise ValueError(f"`{name}` must be that of `{argument}`, {value!r}, got {given!r}; leave it out.")
    return replace(settings, **told)
