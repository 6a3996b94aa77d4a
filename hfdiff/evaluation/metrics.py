"""Distances between sets of images, from the features a network gives them."""

import warnings

import numpy as np
import torch
from torch import Tensor

from .statistics import as_features, feature_statistics

IMAGES_PER_FEATURE = 5  # N / D from which FID's bias is small: 10,000 images for Inception's 2,048 features
ROUNDING = 16 * torch.finfo(torch.float64).eps  # of an eigenvalue, relative to the matrix's Frobenius norm
SMALLEST_SHARE = 5  # the smallest subset of FID∞ has 1/5 of the images, so it has as many as features
FEWEST_TO_EXTRAPOLATE = 2 * SMALLEST_SHARE  # images, as a covariance needs two


def frechet_distance(
    mu1: Tensor | np.ndarray, cov1: Tensor | np.ndarray, mu2: Tensor | np.ndarray, cov2: Tensor | np.ndarray
) -> float:
    """‖μ₁ - μ₂‖² + tr(C₁ + C₂ - 2 (C₁ C₂)^{1/2}), the squared 2-Wasserstein distance of two Gaussians.

    Reference: Heusel et al. 2017, equation 6. The trace of the root is that of (Fᵀ C₂ F)^{1/2} with C₁ = F Fᵀ, whose
    eigenvalues are real whatever the covariances' rank.

    Args:
        mu1: mean of the first set's features, (D,).
        cov1: their covariance, (D, D), symmetric.
        mu2: mean of the second set's features, (D,).
        cov2: their covariance, (D, D), symmetric.

    Raises:
        ValueError: when the shapes do not belong together, or for NaN.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(array).double() for array in (mu1, cov1, mu2, cov2))
    _check_gaussians(mu1, cov1, mu2, cov2)
    return _distance(mu1, cov1, _factor(cov1), mu2, cov2)


def frechet_distance_infinity(
    features: Tensor | np.ndarray,
    mu: Tensor | np.ndarray,
    cov: Tensor | np.ndarray,
    *,
    num_points: int = 15,
    generator: torch.Generator | None = None,
) -> float:
    """FID∞, the Fréchet distance at infinitely many generated images, free of the bias that N of them have.

    That bias is linear in 1/N: a line fitted to the distances of random subsets of growing size is read at 1/N = 0.
    Reference: Chong & Forsyth, "Effectively Unbiased FID and Inception Score", 2020, section 3.
    Differs from the paper: the subsets start at a fifth of the images, not at 5,000, to serve features of any width.

    Args:
        features: of the generated images, (N, D).
        mu: mean of the reference's features, (D,).
        cov: their covariance, (D, D), symmetric. Their own bias stays: take all the reference's images.
        num_points: subsets, at least 2.
        generator: source of the subsets, on the CPU.

    Returns:
        The distance. As the estimate is unbiased, it can fall below 0, where no distance is, for sets that are alike
        or small.

    Raises:
        ValueError: when the shapes do not belong together, or for fewer than 2 points or 10 images.

    Warns:
        UserWarning: where N is under five times D, so small that the bias is not linear.
    """
    if num_points < 2:
        raise ValueError(f"`num_points` must be at least 2 to fit a line, got {num_points}.")
    features = as_features("features", features, minimum=FEWEST_TO_EXTRAPOLATE)
    mu, cov = torch.as_tensor(mu).double(), torch.as_tensor(cov).double()
    _check_gaussians(features[0], cov, mu, cov)
    if warning := small_sample_warning(*features.shape):
        warnings.warn(warning, stacklevel=2)
    factor = _factor(cov)
    sizes = np.linspace(len(features) // SMALLEST_SHARE, len(features), num_points).astype(int)
    distances = []
    for size in sizes.tolist():
        subset = torch.randperm(len(features), generator=generator)[:size]
        statistics = feature_statistics(features[subset.to(features.device)])
        distances.append(_distance(mu, cov, factor, statistics.mean, statistics.covariance))
    _, intercept = np.polyfit(1 / sizes, distances, deg=1)
    return float(intercept)


def small_sample_warning(count: int, width: int) -> str | None:
    """Says so where Fréchet distances of `count` images and `width` features are biased too much to be compared."""
    needed = IMAGES_PER_FEATURE * width
    if count >= needed:
        return None
    return (
        f"{count} images are few for a Fréchet distance of {width} features, which is biased upwards and too far from "
        f"linear in 1/N for FID∞; take {needed} or more, and compare only distances of equally many."
    )


def _check_gaussians(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> None:
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not cov1.shape == cov2.shape == (*mu1.shape, *mu1.shape):
        shapes = [tuple(array.shape) for array in (mu1, cov1, mu2, cov2)]
        raise ValueError(f"Expected shapes (D,), (D, D), (D,), (D, D), got {shapes}; use features of one network.")
    if not all(array.isfinite().all() for array in (mu1, cov1, mu2, cov2)):
        raise ValueError("Means and covariances must be finite, got NaN or infinity; check the network and its input.")


def _factor(cov: Tensor) -> Tensor:
    """F of C = F Fᵀ for a symmetric positive semidefinite matrix of rank R, (D, R)."""
    values, vectors = torch.linalg.eigh(cov)
    kept = _above_rounding(values, cov)
    return vectors[:, kept] * values[kept].sqrt()


def _distance(mu1: Tensor, cov1: Tensor, factor1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    product = factor1.T @ cov2 @ factor1
    values = torch.linalg.eigvalsh(product)
    overlap = values[_above_rounding(values, product)].sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap)


def _above_rounding(values: Tensor, matrix: Tensor) -> Tensor:
    """Which eigenvalues of a matrix are not zero; roots of rounding errors would add up where its rank is low."""
    return values > ROUNDING * matrix.norm()
