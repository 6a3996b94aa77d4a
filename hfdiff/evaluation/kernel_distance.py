"""Kernel distances of two sets of features, squared maximum mean discrepancies: KID and CMMD."""

import numpy as np
import torch
from torch import Tensor

from .distances import as_pair, chunks, squared_distances

BANDWIDTH, SCALE = 10.0, 1000.0  # σ and the factor of CMMD


def kernel_inception_distance(
    real: Tensor | np.ndarray,
    fake: Tensor | np.ndarray,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    """KID, the mean over subsets of the unbiased MMD² with the kernel k(x, y) = (x·y/D + 1)³.

    Reference: Bińkowski et al., "Demystifying MMD GANs", 2018, section 3. Its mean is zero for equal distributions, at
    any number of images, so it may be negative.

    Args:
        real: features of real images, (N, D).
        fake: features of generated images, (M, D).
        subset_size: images of each subset, drawn without replacement from either side.
        num_subsets: how many subsets.
        generator: source of the subsets, on the CPU.

    Raises:
        ValueError: for features of different widths, NaN, or subsets that do not fit.
    """
    sizes = {"subset_size": subset_size, "num_subsets": num_subsets}
    return subset_kernel_distances(real, fake, generator=generator, **sizes).mean().item()


def subset_kernel_distances(
    real: Tensor | np.ndarray,
    fake: Tensor | np.ndarray,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The MMD² of each subset, float64, (num_subsets,); arguments and errors as in [`kernel_inception_distance`]."""
    real, fake = as_pair(real, fake)
    fewest = min(len(real), len(fake))
    if not 2 <= subset_size <= fewest or num_subsets < 1:
        raise ValueError(
            f"`subset_size` must be from 2 to {fewest}, the images of the smaller set, and `num_subsets` at least 1, "
            f"got {subset_size} and {num_subsets}."
        )

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size].to(features.device)]

    return torch.stack([_squared_discrepancy(draw(real), draw(fake)) for _ in range(num_subsets)])


def clip_maximum_mean_discrepancy(real: Tensor | np.ndarray, fake: Tensor | np.ndarray) -> float:
    """CMMD, 1000 times the squared MMD with the kernel k(x, y) = exp(-‖x - y‖²/(2 σ²)), σ = 10.

    Reference: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", 2024,
    section 4, for CLIP's image embeddings of length 1; σ and the factor are the paper's. Pairs of an image with itself
    count, as in the original code, so the distance of two draws of one distribution is above zero: where distances are
    far below σ, by about 5 E‖x - y‖² (1/N + 1/M).

    Args:
        real: features of real images, (N, D).
        fake: features of generated images, (M, D).

    Raises:
        ValueError: for features of different widths, or NaN.
    """
    real, fake = as_pair(real, fake)
    within = _mean_similarity(real, real) + _mean_similarity(fake, fake)
    return SCALE * (within - 2 * _mean_similarity(real, fake))


def _mean_similarity(x: Tensor, y: Tensor) -> float:
    """The mean of CMMD's kernel over all pairs."""
    parts = [squared_distances(part, y).div_(-2 * BANDWIDTH**2).exp_().sum() for part in chunks(x, len(y))]
    return torch.stack(parts).sum().item() / (len(x) * len(y))


def _squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased MMD² of (m, D) and (m, D): means over pairs of different images, less twice that across the sets."""
    m = len(x)
    within = [kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y))]
    return (within[0] + within[1]) / (m * (m - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)
