"""Checks of what schedulers are given, made before any arithmetic."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEARNED_VARIANCES = ("learned", "learned_range")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def check_shape(name: str, tensor: "Tensor | None", sample: "Tensor") -> None:
    """Refuses a tensor, where there is one, of another shape than the sample's."""
    if tensor is not None and tensor.shape != sample.shape:
        raise ValueError(f"`{name}` must have the sample's shape {tuple(sample.shape)}, got {tuple(tensor.shape)}.")
