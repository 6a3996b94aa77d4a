"""What a caller's guide and projection are, and give at each step; errors of a step name it."""

import inspect
from typing import Any

from torch import Tensor

from .steps import takes


def check_guide(guide: Any) -> None:
    """Refuses what is no function of (x_t, t, x_0), as far as it tells; None is no guide.

    Raises:
        ValueError: then.
    """
    if guide is None:
        return
    if not callable(guide):
        raise ValueError(
            f"`guide` must be a function of (x_t, t, x_0) that gives one log-probability per image, got {guide!r}."
        )
    if not takes(guide, 3):
        raise ValueError(
            f"`guide` must take (x_t, t, x_0), got a function of {inspect.signature(guide)}; name all three, also what "
            "it does not read."
        )


def check_log_prob(log_prob: Any, xt: Tensor, index: int, timestep: Any) -> Tensor:
    """Refuses what a guide gives where it is no log-probability of each image that a gradient comes from.

    Raises:
        ValueError: then, with the step.
    """
    step = f"at step {index} (timestep {float(timestep):g})"
    if not isinstance(log_prob, Tensor) or log_prob.shape != xt.shape[:1]:
        came = f"shape {tuple(log_prob.shape)}" if isinstance(log_prob, Tensor) else f"a {type(log_prob).__name__}"
        raise ValueError(
            f"`guide` must give one log-probability per image, of shape ({len(xt)},), got {came} {step}; sum over each "
            "image's pixels."
        )
    if not log_prob.isfinite().all():
        raise ValueError(
            f"`guide` must give finite log-probabilities, got {log_prob.tolist()} {step}; bound what it computes, or "
            "its strength."
        )
    if not log_prob.requires_grad:
        raise ValueError(
            f"`guide` must give a value that torch can differentiate by x_0 or x_t, got one without a graph {step}; "
            "compute it from them by torch, without `detach` or `no_grad`."
        )
    return log_prob


def check_gradient(gradient: Tensor | None, name: str, index: int, timestep: Any) -> Tensor:
    """Refuses a gradient of log f that is not there, or not finite.

    Args:
        gradient: of log f.
        name: of what it is by.
        index: of the step.
        timestep: t.

    Raises:
        ValueError: then, with the step.
    """
    step = f"at step {index} (timestep {float(timestep):g})"
    if gradient is None:
        raise ValueError(
            f"`guide` must give a value that depends on {name}, got one that does not {step}; compute it from "
            "what it is given."
        )
    if not gradient.isfinite().all():
        raise ValueError(
            f"`guide` must have a finite gradient by {name}, got NaN or infinity {step}; keep away from points such as "
            "`sqrt(0)`, or lower its strength."
        )
    return gradient


def check_projected(projected: Any, x0: Tensor, index: int, timestep: Any) -> Tensor:
    """Refuses what a projection gives where it is not finite images of the same shape.

    Raises:
        ValueError: then, with the step.
    """
    fits = isinstance(projected, Tensor) and projected.shape == x0.shape
    if not fits or not projected.isfinite().all():
        came = f"shape {tuple(projected.shape)}" if isinstance(projected, Tensor) else f"a {type(projected).__name__}"
        came = "NaN or infinity" if fits else came
        raise ValueError(
            f"`projection` must give finite images of shape {tuple(x0.shape)}, got {came} at step {index} "
            f"(timestep {float(timestep):g}); map x_0 to an image like it."
        )
    return projected
