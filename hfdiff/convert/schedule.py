"""The noise of the originals as configs of hfdiff's schedulers."""

from collections.abc import Mapping
from typing import Any

from ..schedulers.checks import check_choice
from ..schedulers.noise import space_timesteps

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
LANGEVIN = {  # of NCSN's code, and of NCSNv2's where its configuration does not say
    1: {"steps_per_level": 100, "step_size": 2e-5, "denoise_final": False},
    2: {"steps_per_level": 200, "step_size": 8e-6, "denoise_final": True},
}
SAMPLING = {"steps_per_level": "n_steps_each", "step_size": "step_lr", "denoise_final": "denoise"}


def ddpm_config(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a [`DDPMScheduler`] from the diffusion flags of guided-diffusion, all of them given.

    Raises:
        ValueError: for an unknown schedule, or a respacing that the chain cannot have.
    """
    steps = flags["diffusion_steps"]
    check_choice("noise_schedule", flags["noise_schedule"], tuple(SCHEDULES))
    if steps < 1:
        raise ValueError(f"`diffusion_steps` must be at least 1, got {steps}.")
    respacing = flags["timestep_respacing"] or None
    if respacing is not None:
        space_timesteps(steps, respacing)
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    return {
        **beta_config(flags),
        "variance_type": "learned_range" if flags["learn_sigma"] else fixed,
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "clip_sample": flags["clip_denoised"],
        "respacing": respacing,
    }


def beta_config(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make the noise levels; a linear schedule's betas shrink with the length of the chain."""
    scale = 1000 / flags["diffusion_steps"]
    return {
        "num_train_timesteps": flags["diffusion_steps"],
        "beta_schedule": SCHEDULES[flags["noise_schedule"]],
        "beta_start": scale * 1e-4,
        "beta_end": scale * 0.02,
    }


def langevin_config(settings: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The arguments of an [`AnnealedLangevinScheduler`] from the configuration of an NCSN.

    Raises:
        ValueError: for levels or images that no pipeline draws.
    """
    model, sampling = settings["model"], settings.get("sampling") or {}
    if model.get("sigma_dist", "geometric") != "geometric" or settings["data"].get("logit_transform"):
        raise ValueError(
            "`config` must have geometric noise levels and no `logit_transform` to become a pipeline; "
            "`hfdiff.convert.ncsn.load_model` opens the network alone."
        )
    given = {ours: sampling[theirs] for ours, theirs in SAMPLING.items() if theirs in sampling}
    return {
        "num_train_timesteps": model["num_classes"],
        "sigma_min": float(model["sigma_end"]),
        "sigma_max": float(model["sigma_begin"]),
        **LANGEVIN[version],
        **given,
    }
