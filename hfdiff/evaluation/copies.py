"""Copies of training images: samples that are far nearer to one of them than to the next ones."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .settings import COPY_NEIGHBOURS, COPY_THRESHOLD
from .statistics import as_rows

BLOCK = 4096  # rows of either set whose distances are held at once, in float64: 128 MiB
ONE_IN = 100  # held-out images may pass for a copy


class Neighbours(NamedTuple):
    """The nearest training images of samples, the nearest first.

    Args:
        distances: Euclidean, float64, (N, k).
        indices: of the training images, int64, (N, k).
    """

    distances: Tensor
    indices: Tensor

    @property
    def ratios(self) -> Tensor:
        """As [`copy_ratios`] gives them, (N,)."""
        nearest, mean = self.distances[:, 0], self.distances.mean(dim=1)
        return torch.where(mean > 0, nearest / mean, 0.0)


class Copies(NamedTuple):
    """How many samples are copies.

    Args:
        share: of the samples, from 0 to 1.
        threshold: the ratio up to which they are called copies.
        held_out_share: of images that nothing was trained on, which pass for copies by chance, from 0 to 1; None
            without such images.
        neighbours: of each sample.
        held_out_ratios: as [`copy_ratios`] gives them, (H,); None without such images.
    """

    share: float
    threshold: float
    held_out_share: float | None
    neighbours: Neighbours
    held_out_ratios: Tensor | None


def measure_copies(
    samples: Tensor | np.ndarray,
    training: Tensor | np.ndarray,
    held_out: Tensor | np.ndarray | None = None,
    *,
    k: int = COPY_NEIGHBOURS,
    threshold: float = COPY_THRESHOLD,
) -> Copies:
    """The share of samples that copy a training image, and of held-out images that pass for copies.

    Args:
        samples: images or their features, (N, ...), of any real type; images as bytes are compared exactly.
        training: those the model was trained on, (M, ...), with M of at least k.
        held_out: images of the same kind that it was not trained on, (H, ...); with them the threshold is that of
            [`copy_threshold`].
        k: how many neighbours set the scale, as in [`copy_ratios`].
        threshold: the ratio up to which a sample is a copy.

    Raises:
        ValueError: for sets of different widths, NaN, no images, or a k that is not from 2 to M.
    """
    neighbours = nearest_neighbours(_flat(samples), _flat(training), k)
    if held_out is None:
        return Copies(share_of_copies(neighbours.ratios, threshold), threshold, None, neighbours, None)
    ratios = nearest_neighbours(_flat(held_out), _flat(training), k).ratios
    threshold = copy_threshold(ratios, threshold)
    shares = [share_of_copies(found, threshold) for found in (neighbours.ratios, ratios)]
    return Copies(shares[0], threshold, shares[1], neighbours, ratios)


def copy_ratios(samples: Tensor | np.ndarray, training: Tensor | np.ndarray, k: int = COPY_NEIGHBOURS) -> Tensor:
    """d_1 / mean(d_1, ..., d_k) of each sample, d_i being its distance to the i-th nearest training image, (N,).

    From 0, the sample is one of them, to 1, all k are equally far. Reference: Carlini et al., "Extracting Training Data
    from Diffusion Models", 2023, section 5.1, the adaptive ℓ2 distance with n = k = 50, where a ratio up to α = 1/2 is
    a copy. With k = 2 the same threshold says that the nearest is at a third of the second's distance: the criterion
    of Yoon et al., "Diffusion Probabilistic Models Generalize when They Fail to Memorize", 2023.

    Where training images lie densely in d dimensions, a fresh image passes the threshold at k = 2 with probability
    3^-d. An image that the training set holds several times, each slightly changed, hides copies of itself.

    Args:
        samples: (N, D), of any real type.
        training: (M, D).
        k: how many nearest neighbours set the scale, the nearest one included.

    Raises:
        ValueError: for sets of different widths, NaN, or a k that is not from 2 to M.
    """
    return nearest_neighbours(samples, training, k).ratios


def share_of_copies(ratios: Tensor | np.ndarray, threshold: float = COPY_THRESHOLD) -> float:
    """The share of ratios of [`copy_ratios`] that are not above the threshold, from 0 to 1.

    Raises:
        ValueError: for no ratios, or a threshold that is not from 0 to 1.
    """
    ratios = torch.as_tensor(ratios)
    if not len(ratios) or not 0 <= threshold <= 1:
        raise ValueError(
            f"`ratios` must hold some and `threshold` be from 0 to 1, got {len(ratios)} ratios and {threshold}."
        )
    return (ratios <= threshold).double().mean().item()


def copy_threshold(held_out_ratios: Tensor | np.ndarray, threshold: float = COPY_THRESHOLD) -> float:
    """The threshold, or the ratio up to which 1% of held-out images are, whichever is less.

    Images nobody has seen have small ratios where the data has few dimensions; there the fixed threshold would call
    them copies. The quantile never raises it, so a copy is always far nearer to one image than to others.

    Args:
        held_out_ratios: of at least one image; with fewer than 100 the quantile is the least of them.
        threshold: without held-out images.

    Raises:
        ValueError: for no ratios.
    """
    ratios = torch.as_tensor(held_out_ratios).sort().values
    if not len(ratios):
        raise ValueError("`held_out_ratios` must hold some, got none; leave held-out images away.")
    return min(threshold, ratios[max(0, len(ratios) // ONE_IN - 1)].item())


def nearest_neighbours(
    samples: Tensor | np.ndarray, training: Tensor | np.ndarray, k: int = COPY_NEIGHBOURS
) -> Neighbours:
    """The k nearest training images of each sample.

    Distances in blocks are ‖x‖² + ‖y‖² - 2 x·y in float64, exact for bytes; those of the k that are found are then
    computed anew from x - y, in which near-duplicates do not cancel. Memory does not grow with N times M.

    Args:
        samples: (N, D), of any real type.
        training: (M, D).
        k: from 2 to M.

    Raises:
        ValueError: for sets of different widths, NaN, or a k that is not from 2 to M.
    """
    samples, training = as_rows("samples", samples), as_rows("training", training)
    if samples.shape[1] != training.shape[1]:
        raise ValueError(
            f"`samples` and `training` must have one width, got {samples.shape[1]} and {training.shape[1]}; take "
            "images of one size and number of channels, or features of one network."
        )
    if not 2 <= k <= len(training):
        raise ValueError(f"`k` must be from 2 to the {len(training)} training images, got {k}.")
    origin = training[0].double()  # of whole numbers, so that bytes stay exact
    parts = [_neighbours(part, training, k, origin) for part in samples.split(BLOCK)]
    return Neighbours(*map(torch.cat, zip(*parts)))


def _neighbours(samples: Tensor, training: Tensor, k: int, origin: Tensor) -> Neighbours:
    x = samples.double() - origin
    squares = x.new_empty(len(x), 0)
    indices = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for start in range(0, len(training), BLOCK):
        y = training[start : start + BLOCK].double() - origin
        found = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2)  # less ‖x‖², which orders nothing
        best, columns = found.topk(min(k, len(y)), largest=False)
        squares, indices = torch.cat([squares, best], dim=1), torch.cat([indices, columns + start], dim=1)
        squares, kept = squares.topk(min(k, squares.shape[1]), largest=False)
        indices = indices.gather(1, kept)
    exact = [(x - (training[rows].double() - origin)).norm(dim=1) for rows in indices.T]
    distances, order = torch.stack(exact, dim=1).sort(dim=1, stable=True)
    return Neighbours(distances, indices.gather(1, order))


def _flat(images: Tensor | np.ndarray) -> Tensor:
    return torch.as_tensor(images).flatten(1)
