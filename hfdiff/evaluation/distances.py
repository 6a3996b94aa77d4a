"""Distances between two sets of features, for metrics that compare single images."""

import numpy as np
import torch
from torch import Tensor

from .statistics import as_features

CHUNK = 2**24  # distances held at once, in float64: 128 MiB
ROUNDING = 1e-13  # of a squared distance computed from a product, relative to the norms


def as_pair(
    real: Tensor | np.ndarray, fake: Tensor | np.ndarray, fewest: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Features of real and of generated images in float64, (N, D) and (M, D).

    Args:
        real: of real images.
        fake: of generated ones.
        fewest: images of either that make sense.

    Raises:
        ValueError: for features of different widths, NaN, or too few images.
    """
    real, fake = as_features("real", real, minimum=fewest[0]), as_features("fake", fake, minimum=fewest[1])
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"`real` and `fake` must have one width, got {real.shape[1]} and {fake.shape[1]}; use one network."
        )
    return real, fake


def chunks(points: Tensor, columns: int) -> tuple[Tensor, ...]:
    """The points in parts, whose distances to so many others fit into memory."""
    return points.split(max(1, CHUNK // columns))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x‖² + ‖y‖² - 2 x·y for every pair, (N, M); what is below its rounding is zero, so that copies are at none."""
    norms = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
    distances = torch.addmm(norms, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= ROUNDING * norms, 0)
