"""Precision and recall, density and coverage: the share of generated images among the real ones, and the reverse."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .distances import as_pair, chunks, squared_distances


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
    real, fake = _prepare(real, fake, k, fewest_fake=k + 1)
    precision = _share_within(fake, real, _squared_radii(real, k))
    recall = _share_within(real, fake, _squared_radii(fake, k))
    return PrecisionRecall(precision, recall)


class DensityCoverage(NamedTuple):
    """How generated images lie around the real ones.

    Args:
        density: how many balls around real images hold a generated one, over k; 1 on average for equal distributions.
        coverage: share of the real images whose ball holds a generated one, from 0 to 1.
    """

    density: float
    coverage: float


def density_coverage(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 5) -> DensityCoverage:
    """Density and coverage, which outliers among the real images disturb less than precision and recall.

    Reference: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020, equations 6 and 7:
    density is Σ_j Σ_i 1[y_j in B(x_i)] / (k M), coverage Σ_i 1[some y_j in B(x_i)] / N, where the ball B(x_i) around a
    real image reaches its k-th nearest other one. Balls are open, as in the original code: so real images measured
    against themselves have a density of 1, where the closed balls of [`precision_recall`] would give (k + 1) / k.

    Args:
        real: features of real images, x_i, (N, D).
        fake: features of generated images, y_j, (M, D).
        k: which neighbour the ball reaches, itself not counted.

    Raises:
        ValueError: for features of different widths, NaN, or not more than k real images.
    """
    real, fake = _prepare(real, fake, k, fewest_fake=1)
    radii = _squared_radii(real, k)
    held, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in chunks(fake, len(real)):
        inside = squared_distances(part, real) < radii
        held += int(inside.sum())
        covered |= inside.any(dim=0)
    return DensityCoverage(held / (k * len(fake)), covered.double().mean().item())


def _prepare(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int, fewest_fake: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64, around the real ones' mean: distances do not change, and lose less to rounding."""
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    real, fake = as_pair(real, fake, (k + 1, fewest_fake))
    centre = real.mean(dim=0)
    return real - centre, fake - centre


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other point, (N,)."""
    rows = [squared_distances(part, points).kthvalue(k + 1, dim=1).values for part in chunks(points, len(points))]
    return torch.cat(rows)


def _share_within(points: Tensor, centres: Tensor, squared_radii: Tensor) -> float:
    """Share of the points that lie in a ball around any of the centres."""
    parts = chunks(points, len(centres))
    within = [(squared_distances(part, centres) <= squared_radii).any(dim=1) for part in parts]
    return torch.cat(within).double().mean().item()
