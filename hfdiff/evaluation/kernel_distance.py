"""The kernel distance of two sets of features: KID, an unbiased squared maximum mean discrepancy."""

import numpy as np
import torch
from torch import Tensor

from .statistics import as_features


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
    real, fake = as_features("real", real), as_features("fake", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"`real` and `fake` must have one width, got {real.shape[1]} and {fake.shape[1]}; use one network."
        )
    fewest = min(len(real), len(fake))
    if not 2 <= subset_size <= fewest or num_subsets < 1:
        raise ValueError(
            f"`subset_size` must be from 2 to {fewest}, the images of the smaller set, and `num_subsets` at least 1, "
            f"got {subset_size} and {num_subsets}."
        )

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size].to(features.device)]

    return torch.stack([_squared_discrepancy(draw(real), draw(fake)) for _ in range(num_subsets)])


def _squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased MMD² of (m, D) and (m, D): means over pairs of different images, less twice that across the sets."""
    m = len(x)
    within = [kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y))]
    return (within[0] + within[1]) / (m * (m - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)
