"""Improved precision and recall: the share of generated images among the real ones, and the reverse."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .statistics import as_features

CHUNK = 2**24  # distances held at once, in float64: 128 MiB
ROUNDING = 1e-13  # of a squared distance computed from a product, relative to the norms


class PrecisionRecall(NamedTuple):
    """How two sets of features overlap.

    Args:
        precision: share of the generated images within the manifold of the real ones, from 0 to 1.
        recall: share of the real images within the manifold of the generated ones, from 0 to 1.
    """

    precision: float
    recall: float


def precision_recall(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 3) -> PrecisionRecall:
    """Precision and recall with manifolds made of balls around each image, up to its k-th nearest neighbour.

    Reference: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
    equation 1. Memory does not grow with the square of the number of images.

    Args:
        real: features of real images, (N, D).
        fake: features of generated images, (M, D).
        k: which neighbour of the same set the ball reaches, itself not counted.

    Raises:
        ValueError: for features of different widths, NaN, or not more than k images on either side.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    real, fake = as_features("real", real, minimum=k + 1), as_features("fake", fake, minimum=k + 1)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"`real` and `fake` must have one width, got {real.shape[1]} and {fake.shape[1]}; use one network."
        )
    centre = real.mean(dim=0)  # distances do not change, and lose less to rounding
    real, fake = real - centre, fake - centre
    precision = _share_within(fake, real, _squared_radii(real, k))
    recall = _share_within(real, fake, _squared_radii(fake, k))
    return PrecisionRecall(precision, recall)


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other point, (N,)."""
    rows = [_squared_distances(part, points).kthvalue(k + 1, dim=1).values for part in _chunks(points, len(points))]
    return torch.cat(rows)


def _share_within(points: Tensor, centres: Tensor, squared_radii: Tensor) -> float:
    """Share of the points that lie in a ball around any of the centres."""
    parts = _chunks(points, len(centres))
    within = [(_squared_distances(part, centres) <= squared_radii).any(dim=1) for part in parts]
    return torch.cat(within).double().mean().item()


def _chunks(points: Tensor, columns: int) -> tuple[Tensor, ...]:
    return points.split(max(1, CHUNK // columns))


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x‖² + ‖y‖² - 2 x·y for every pair, (N, M); what is below its rounding is zero, so that copies are at none."""
    norms = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
    distances = torch.addmm(norms, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= ROUNDING * norms, 0)
