"""Distances between sets of images, from the features a network gives them."""

import torch
from torch import Tensor


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """‖μ₁ - μ₂‖² + tr(C₁ + C₂ - 2 (C₁ C₂)^{1/2}), the squared 2-Wasserstein distance of two Gaussians.

    Reference: Heusel et al. 2017, equation 6. The trace of the root is that of (C₁^{1/2} C₂ C₁^{1/2})^{1/2}, whose
    eigenvalues are real whatever the covariances' rank.

    Args:
        mu1: mean of the first set's features, (D,).
        cov1: their covariance, (D, D), symmetric.
        mu2: mean of the second set's features, (D,).
        cov2: their covariance, (D, D), symmetric.

    Raises:
        ValueError: when the shapes do not belong together.
    """
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not cov1.shape == cov2.shape == (*mu1.shape, *mu1.shape):
        shapes = [tuple(array.shape) for array in (mu1, cov1, mu2, cov2)]
        raise ValueError(f"Expected shapes (D,), (D, D), (D,), (D, D), got {shapes}; use features of one network.")
    mu1, cov1, mu2, cov2 = (array.double() for array in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap)
