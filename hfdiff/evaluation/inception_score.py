"""The Inception Score: each image clearly of one class, all images together of many (Salimans et al. 2016)."""

import numpy as np
import torch
from torch import Tensor

from .settings import SPLIT_SIZE

SUM_TOLERANCE = 1e-3  # of a row of probabilities, from 1; rows in half precision stay below it


def inception_score(probs: Tensor | np.ndarray, splits: int | None = None, *, split_size: int = SPLIT_SIZE) -> float:
    """exp(E_x KL(p(y|x) || p(y))), the mean over splits: from 1, all images look alike, to K, the number of classes.

    p(y) is the mean of p(y|x) over the images of a split. Reference: Salimans et al., "Improved Techniques for Training
    GANs", 2016, section 4. The score falls with the size of a split, so two are comparable only at the same one.

    Args:
        probs: p(y|x), (N, K). Splits are consecutive rows: shuffle images that are sorted by class before.
        splits: number of splits, of equal size but for rounding; None takes splits of `split_size` images, the last
            one of what is left, as guided-diffusion's evaluator does.
        split_size: images of a split.

    Raises:
        ValueError: for rows that are no probabilities, or splits that do not fit.
    """
    return split_inception_scores(probs, splits, split_size=split_size).mean().item()


def split_inception_scores(
    probs: Tensor | np.ndarray, splits: int | None = None, *, split_size: int = SPLIT_SIZE
) -> Tensor:
    """The score of each split, float64, (S,); arguments and errors as in [`inception_score`]."""
    probs = _as_probabilities(probs)
    if split_size < 1 or (splits is not None and not 1 <= splits <= len(probs)):
        raise ValueError(
            f"`splits` must be from 1 to the {len(probs)} images and `split_size` at least 1, got {splits} and "
            f"{split_size}."
        )
    edges = range(0, len(probs), split_size) if splits is None else [i * len(probs) // splits for i in range(splits)]
    return torch.stack([_score(part) for part in probs.tensor_split(list(edges)[1:])])


def _score(probs: Tensor) -> Tensor:
    marginal = probs.mean(dim=0)
    divergence = torch.xlogy(probs, probs) - torch.xlogy(probs, marginal)  # 0 log 0 = 0
    return divergence.sum(dim=1).mean().exp()


def _as_probabilities(probs: Tensor | np.ndarray) -> Tensor:
    probs = torch.as_tensor(probs).double()
    if probs.ndim != 2 or not probs.numel():
        raise ValueError(f"`probs` must have shape (N, K), one row per image, got {tuple(probs.shape)}.")
    wrong = ~((probs >= 0).all(dim=1) & ((probs.sum(dim=1) - 1).abs() <= SUM_TOLERANCE))  # also where NaN
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"`probs` must be probabilities that sum to 1, got a sum of {probs[row].sum():.4g} and a least value of "
            f"{probs[row].min():.4g} in row {row}; apply the softmax to logits."
        )
    return probs
