"""Random numbers of a batch whose images may each have a generator of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def repeat_generators(generator: Any, times: int) -> Any:
    """Generators of the images' particles, each its image's own; one for all stays one."""
    return [own for own in generator for _ in range(times)] if isinstance(generator, list | tuple) else generator


def uniform_per_image(generator: Any, count: int, wanted: Sequence[bool] | None = None) -> Tensor:
    """One number in [0, 1) for each image, by its own generator where there is a list of them, (B,), float64.

    Args:
        generator: of the images: one for all, or one each.
        count: B.
        wanted: of each image, whether its number is read; an image's own generator draws none that is not, since its
            batch would show in its stream. All by default.
    """
    if not isinstance(generator, list | tuple):
        device = None if generator is None else generator.device
        return torch.rand(count, generator=generator, device=device, dtype=torch.float64).cpu()
    numbers = torch.zeros(count, dtype=torch.float64)
    for index, own in enumerate(generator):
        if wanted is None or wanted[index]:
            numbers[index] = torch.rand((), generator=own, device=own.device, dtype=torch.float64)
    return numbers
