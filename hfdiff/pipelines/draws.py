"""Random numbers of a batch whose images may each have a generator of their own."""

from typing import Any

import torch
from torch import Tensor


def repeat_generators(generator: Any, times: int) -> Any:
    """Generators of the images' particles, each its image's own; one for all stays one."""
    return [own for own in generator for _ in range(times)] if isinstance(generator, list | tuple) else generator


def uniform_per_image(generator: Any, count: int) -> Tensor:
    """One number in [0, 1) for each image, by its own generator where there is a list of them, (B,), float64."""
    own = generator if isinstance(generator, list | tuple) else [generator]
    device = [None if g is None else g.device for g in own]
    draws = [torch.rand(count // len(own), generator=g, device=d, dtype=torch.float64) for g, d in zip(own, device)]
    return torch.cat([draw.cpu() for draw in draws])
