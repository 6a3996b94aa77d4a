"""How any scheduler is asked for its steps: timesteps, options of `step`, the ᾱ of a step, the way it is guided."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from .components import config_of
from .inputs import check_choice, check_num_inference_steps, most_steps

GUIDANCE_MODES = ("auto", "mean_shift", "score_shift")
SCORE_PREDICTIONS = ("epsilon", "sample", "v_prediction")  # the model outputs a score shift can be made in
OWN_CLIPS = ("clip_sample", "thresholding")  # a scheduler's switches of its own clipping of x_0

logger = logging.get_logger(__name__)


def parameters_of(function: Callable) -> set[str]:
    """The names of its parameters."""
    return set(inspect.signature(function).parameters)


def takes(function: Callable, count: int) -> bool:
    """Whether a function can be called with so many arguments, as far as it tells."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # of a function that has no signature
        return True
    return True


def set_timesteps(
    scheduler: Any,
    device: torch.device,
    num_inference_steps: int | None,
    timesteps: Sequence[int] | None = None,
    respacing: str | None = None,
) -> Tensor:
    """Chooses the steps of a sampling: so many, these timesteps, or a respacing; returns them.

    Raises:
        ValueError: for more than one choice, or one that the scheduler does not know.
    """
    given = {"timesteps": timesteps, "respacing": respacing}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if len(chosen) > 1:
        raise ValueError(f"`timesteps` and `respacing` exclude each other, got {timesteps} and {respacing!r}.")
    for name, value in chosen.items():
        if name not in parameters_of(scheduler.set_timesteps):
            raise ValueError(
                f"`{name}` must be left out for a {type(scheduler).__name__}, which takes none, got {value!r}; use "
                "`num_inference_steps`, or hfdiff.DDPMScheduler."
            )
    if not chosen:
        if num_inference_steps is not None:
            check_num_inference_steps(num_inference_steps, most_steps(scheduler))
        chosen = {"num_inference_steps": num_inference_steps}
    scheduler.set_timesteps(**chosen, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # a timestep that comes twice does not say which step it is of
    steps = scheduler.timesteps
    if len(steps.unique()) < len(steps) and scheduler.order == 1 and config_of(scheduler, "steps_per_level") is None:
        logger.warning(
            "%s's spacing gives %d different timesteps in %d steps: the model is called in vain for the others; use "
            "fewer steps or another spacing.",
            type(scheduler).__name__,
            len(steps.unique()),
            len(steps),
        )
    return steps


def step_options(scheduler: Any, generator: Any, eta: float) -> dict[str, Any]:
    """What a scheduler's `step` is given beside output, timestep and sample.

    Raises:
        ValueError: for an η out of [0, 1], or one that the scheduler does not take.
    """
    accepted = parameters_of(scheduler.step)
    if not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be a number from 0, deterministic, to 1, got {eta!r}.")
    if eta and "eta" not in accepted:
        raise ValueError(
            f"`eta` must be left out for a {type(scheduler).__name__}, whose step takes none, got {eta}; use a "
            "DDIMScheduler."
        )
    given = {"generator": generator, "eta": eta}
    return {name: value for name, value in given.items() if name in accepted and (name != "eta" or value)}


def alpha_bar_at(scheduler: Any, index: int, timestep: Tensor) -> float:
    """ᾱ of what the model is given at a step.

    A scheduler with `sigmas` has σ = √((1-ᾱ)/ᾱ) for each step, whether it works in x_t or, scaling the model's input by
    √ᾱ, in x_0 + σ ε. The others have ᾱ for each timestep of training.
    """
    if getattr(scheduler, "sigmas", None) is None:
        return float(scheduler.alphas_cumprod[int(timestep)])
    if getattr(scheduler, "state_in_first_order", True):
        return 1 / (1 + float(scheduler.sigmas[index]) ** 2)
    return float(scheduler.scale_model_input(torch.ones(()), timestep)) ** 2  # between two levels of `sigmas`


def alpha_bars(scheduler: Any, timesteps: Tensor) -> list[float]:
    """ᾱ of each step, and 1, that of the image after the last."""
    return [*(alpha_bar_at(scheduler, index, timestep) for index, timestep in enumerate(timesteps)), 1.0]


@contextmanager
def kept_state(scheduler: Any) -> Iterator[None]:
    """Lets a scheduler forget the steps inside, so that it can take them again."""
    state = {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}
    try:
        yield
    finally:
        vars(scheduler).update(state)


def scheduler_guides(scheduler: Any, guidance_mode: str, is_guided: bool = True) -> bool:
    """Whether a scheduler's `step` follows a guidance mode by itself; if not, its score is to be shifted.

    Raises:
        ValueError: for a mode that the scheduler cannot follow, or a scheduler of no diffusion model.
    """
    check_choice("guidance_mode", guidance_mode, GUIDANCE_MODES)
    if not hasattr(scheduler, "init_noise_sigma") or not hasattr(scheduler, "scale_model_input"):
        raise ValueError(
            "`scheduler` must be of diffusion models, with `init_noise_sigma` and `scale_model_input`, got "
            f"{type(scheduler).__name__}; use a scheduler of the DDPM family."
        )
    if not is_guided:
        return False
    takes_guidance = "guidance" in parameters_of(scheduler.step)
    name = type(scheduler).__name__
    own_mode = getattr(scheduler, "guidance_mode", "mean_shift") if takes_guidance else None
    if own_mode is not None and guidance_mode in ("auto", own_mode):
        return True
    if guidance_mode == "mean_shift":
        raise ValueError(
            f'`guidance_mode` "mean_shift" needs a scheduler whose `step` shifts its mean, got {name}; use "auto" or '
            '"score_shift", or hfdiff.DDPMScheduler.'
        )
    kind = config_of(scheduler, "prediction_type")
    if kind not in SCORE_PREDICTIONS or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"`scheduler` must have noise levels ᾱ and a prediction type among {SCORE_PREDICTIONS} to shift its score, "
            f"got {name} with {kind!r}; use another scheduler."
        )
    return False


@contextmanager
def unclipped(scheduler: Any) -> Iterator[None]:
    """Switches off a scheduler's own clipping of x_0."""
    clips = {name: True for name in OWN_CLIPS if config_of(scheduler, name)}
    scheduler.register_to_config(**dict.fromkeys(clips, False))
    try:
        yield
    finally:
        scheduler.register_to_config(**clips)
