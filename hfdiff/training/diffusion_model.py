"""The model that a classifier is trained to guide, of either family: its network, and its noise levels as config."""

from typing import Any

from diffusers import ModelMixin, UNet2DModel

from ..data.sources import reading_model
from ..models.ncsn import NCSNModel
from ..models.ncsnv2 import NCSNv2Model
from ..pipelines.outputs import draws_from_zero
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..schedulers.scheduling_ddpm import DDPMScheduler

BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
SIGMAS = ("num_train_timesteps", "sigma_schedule", "sigma_min", "sigma_max", "scale_input")
NETWORKS = {kind.__name__: kind for kind in (UNet2DModel, NCSNModel, NCSNv2Model)}

Levels = DDPMScheduler | AnnealedLangevinScheduler


def open_diffusion_model(source: str) -> tuple[ModelMixin, Levels]:
    """The network and the noise levels of a pipeline folder or Hub id, of the DDPM or the NCSN family.

    Raises:
        ValueError: when it is not there, or its data are not in [-1, 1].
    """
    with reading_model("diffusion_model", source):
        network = NETWORKS.get(_class_name(source, "unet"), UNet2DModel).from_pretrained(source, subfolder="unet")
        langevin = _class_name(source, "scheduler") == AnnealedLangevinScheduler.__name__
        kind = AnnealedLangevinScheduler if langevin else DDPMScheduler
        scheduler = kind.from_pretrained(source, subfolder="scheduler")
    if draws_from_zero(network):
        raise ValueError(f"`diffusion_model` must have data in [-1, 1], got one in [0, 1], {source!r}; use another.")
    return network, scheduler


def _class_name(source: str, component: str) -> str:
    reader = {"unet": UNet2DModel, "scheduler": DDPMScheduler}[component]  # configs of any class of their kind
    return str(reader.load_config(source, subfolder=component)["_class_name"])


def noise_schedule(scheduler: Levels) -> dict[str, Any]:
    """The entries of a scheduler's config that make its noise levels, as a classifier's config holds them."""
    names = SIGMAS if scheduler.config.get("sigma_schedule") == "geometric" else BETAS
    return {name: scheduler.config[name] for name in names}


def make_levels(schedule: dict[str, Any]) -> Levels:
    """The noise levels of such entries; those that are left out have their scheduler's defaults."""
    return AnnealedLangevinScheduler(**schedule) if "sigma_schedule" in schedule else DDPMScheduler(**schedule)
