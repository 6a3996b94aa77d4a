"""The metrics by name: what each is computed from, and how."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .accuracy import class_accuracy
from .copies import Neighbours, measure_copies, share_of_copies
from .feature_set import PIXELS
from .inception_score import split_inception_scores
from .kernel_distance import clip_maximum_mean_discrepancy, subset_kernel_distances
from .metrics import frechet_distance, frechet_distance_infinity
from .precision_recall import density_coverage, precision_recall
from .settings import EvaluationSettings
from .statistics import FeatureStatistics

LABELS = "labels"  # of the samples, which accuracy compares probabilities with


class Value(NamedTuple):
    """A metric's value.

    Args:
        mean: of splits or subsets, where there are some; None where it could not be estimated.
        std: over them.
        beside: numbers that the value is to be read with.
        neighbours: of each sample, where they were found on the way.
    """

    mean: float | None
    std: float | None = None
    beside: dict[str, float] | None = None
    neighbours: Neighbours | None = None


def _fid(samples: FeatureStatistics, reference: FeatureStatistics, _: EvaluationSettings) -> dict[str, Value]:
    return {"fid": Value(frechet_distance(*samples[:2], *reference[:2]))}


def _sfid(samples: FeatureStatistics, reference: FeatureStatistics, _: EvaluationSettings) -> dict[str, Value]:
    return {"sfid": Value(frechet_distance(*samples[:2], *reference[:2]))}


def _fid_infinity(samples: Tensor, reference: FeatureStatistics, settings: EvaluationSettings) -> dict[str, Value]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report has it
        distance = frechet_distance_infinity(samples, *reference[:2], generator=_generator(settings))
    return {"fid_infinity": Value(None if distance < 0 else distance)}


def _inception_score(samples: Tensor, _: None, settings: EvaluationSettings) -> dict[str, Value]:
    return {"is": _summary(split_inception_scores(samples, split_size=settings.is_split_size))}


def _kid(samples: Tensor, reference: Tensor, settings: EvaluationSettings) -> dict[str, Value]:
    size = min(settings.kid_subset_size, len(samples), len(reference))
    count = settings.kid_num_subsets if size < max(len(samples), len(reference)) else 1  # all images: one subset
    generator = _generator(settings)
    distances = subset_kernel_distances(reference, samples, subset_size=size, num_subsets=count, generator=generator)
    return {"kid": _summary(distances)}


def _precision_recall(samples: Tensor, reference: Tensor, settings: EvaluationSettings) -> dict[str, Value]:
    found = precision_recall(reference, samples, settings.nearest)
    return {"precision": Value(found.precision), "recall": Value(found.recall)}


def _density_coverage(samples: Tensor, reference: Tensor, settings: EvaluationSettings) -> dict[str, Value]:
    found = density_coverage(reference, samples, settings.density_nearest)
    return {"density": Value(found.density), "coverage": Value(found.coverage)}


def _cmmd(samples: Tensor, reference: Tensor, _: EvaluationSettings) -> dict[str, Value]:
    return {"cmmd": Value(clip_maximum_mean_discrepancy(reference, samples))}


def _copies(samples: Tensor, real: tuple[Tensor, Tensor | None], settings: EvaluationSettings) -> dict[str, Value]:
    return {"copies": _share_of_copies(samples, real, settings)}


def _copies_features(
    samples: Tensor, real: tuple[Tensor, Tensor | None], settings: EvaluationSettings
) -> dict[str, Value]:
    return {"copies_features": _share_of_copies(samples, real, settings)}


def _share_of_copies(samples: Tensor, real: tuple[Tensor, Tensor | None], settings: EvaluationSettings) -> Value:
    asked = settings.copies_threshold
    found = measure_copies(samples, *real, k=settings.copies_nearest, threshold=asked)
    beside = {"threshold": found.threshold}
    if found.held_out_share is not None and found.held_out_ratios is not None:
        beside = {"held_out": found.held_out_share, **beside}
        if found.threshold < asked:
            beside[f"at_{asked:g}"] = share_of_copies(found.neighbours.ratios, asked)
            beside[f"held_out_at_{asked:g}"] = share_of_copies(found.held_out_ratios, asked)
    return Value(found.share, beside=beside, neighbours=found.neighbours)


def _accuracy(samples: Tensor, labels: Tensor, _: EvaluationSettings) -> dict[str, Value]:
    found = class_accuracy(samples, labels)
    return {"accuracy": Value(found.overall), "worst_class_accuracy": Value(found.worst)}


def _generator(settings: EvaluationSettings) -> torch.Generator:
    """A source of subsets for one metric, so that it does not depend on the others that are asked for."""
    return torch.Generator().manual_seed(settings.seed)


def _summary(values: Tensor) -> Value:
    return Value(values.mean().item(), values.std().item() if len(values) > 1 else None)


class Metric(NamedTuple):
    """What a metric is computed from, and how: several may come from one function.

    Args:
        samples: the part of the samples, one that [`collect`] gathers.
        reference: what it is compared with: a part of the reference, `LABELS`, the samples' own, or nothing.
        compute: maps the two to values.
        held_out: whether it is also compared with that part of the held-out images: then the second argument of
            `compute` is a pair, whose second is None where there are no such images.
    """

    samples: str
    reference: str | None
    compute: Callable[[Any, Any, EvaluationSettings], dict[str, Value]]
    held_out: bool = False


METRICS = {
    "fid": Metric("statistics", "statistics", _fid),
    "fid_infinity": Metric("pooled", "statistics", _fid_infinity),
    "is": Metric("probs", None, _inception_score),
    "kid": Metric("pooled", "pooled", _kid),
    "precision": Metric("pooled", "pooled", _precision_recall),
    "recall": Metric("pooled", "pooled", _precision_recall),
    "density": Metric("pooled", "pooled", _density_coverage),
    "coverage": Metric("pooled", "pooled", _density_coverage),
    "cmmd": Metric("pooled", "pooled", _cmmd),
    "sfid": Metric("spatial_statistics", "spatial_statistics", _sfid),
    "copies": Metric(PIXELS, PIXELS, _copies, held_out=True),
    "copies_features": Metric("pooled", "pooled", _copies_features, held_out=True),
    "accuracy": Metric("probs", LABELS, _accuracy),
    "worst_class_accuracy": Metric("probs", LABELS, _accuracy),
}
