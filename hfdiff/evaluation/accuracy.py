"""Accuracy of conditional samples: the share of images that a classifier gives the class they were asked to be of."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .features import FeatureExtractor


class ClassAccuracy(NamedTuple):
    """How often a classifier sees what was asked for.

    Args:
        overall: share of all images, from 0 to 1.
        worst: share of the images of the class with the smallest one, from 0 to 1.
    """

    overall: float
    worst: float


def class_accuracy(probs: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> ClassAccuracy:
    """Accuracy of a classifier's most probable class, overall and of the worst class among those asked for.

    Reference: Ravuri & Vinyals, "Classification Accuracy Score for Conditional Generative Models", 2019, measure the
    reverse, a classifier trained on samples; here it is one of real images, so a model that draws one good image per
    class passes: read it beside recall.

    Args:
        probs: p(y|x) or any score that grows with it, (N, K).
        labels: the classes asked for, integers in [0, K), (N,).

    Raises:
        ValueError: for shapes that do not belong together, or labels that are no classes of the classifier.
    """
    probs, labels = torch.as_tensor(probs), torch.as_tensor(labels)
    if probs.ndim != 2 or not len(probs) or labels.shape != probs.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"`probs` and `labels` must have shapes (N, K) and (N,), the latter of integers, got {tuple(probs.shape)} "
            f"and {labels.dtype} {tuple(labels.shape)}; give one label per image."
        )
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(
            f"`labels` must be classes of the classifier, from 0 to {probs.shape[1] - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}; take a classifier of the same classes."
        )
    right = (probs.argmax(dim=1) == labels).double()
    shares = [right[labels == label].mean().item() for label in labels.unique()]
    return ClassAccuracy(right.mean().item(), min(shares))


@torch.no_grad()
def predicted_classes(extractor: FeatureExtractor, images: np.ndarray) -> list[int]:
    """The class that a classifier thinks most probable for each image of (N, H, W, C) uint8."""
    probs = extractor(torch.from_numpy(images).permute(0, 3, 1, 2)).probs
    if probs is None:
        raise ValueError("A judge must give class probabilities, got features alone; take an image classifier.")
    return probs.argmax(dim=-1).tolist()
