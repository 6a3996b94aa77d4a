"""Metrics of a set of images, each network called once per image, with a report of what was compared."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .feature_set import STATISTICS, Reference, collect, collect_reference, first_features
from .features import FeatureExtractor, ImageFeatures
from .inception_score import SPLIT_SIZE, inception_score, split_inception_scores
from .kernel_distance import subset_kernel_distances
from .metrics import frechet_distance, frechet_distance_infinity, small_sample_warning
from .precision_recall import precision_recall
from .report import Report
from .sources import ImageSource
from .statistics import FeatureStatistics, StatisticsFile

SORTED_SPLITS = 0.8  # of the score of all images: splits that have less are not alike
FRECHET = {
    "fid": "pooled",
    "fid_infinity": "pooled",
    "sfid": "spatial",
}  # metrics with a bias that is known, and their features
SAME_FEATURES = ("weights_sha256", "resize")  # of a record of provenance


@dataclass(frozen=True)
class EvaluationSettings:
    """How the metrics are computed.

    Args:
        batch_size: images per call of the network.
        is_split_size: images of each split of the Inception Score.
        kid_subset_size: images of each of KID's subsets, at most; all where there are fewer.
        kid_num_subsets: how many subsets.
        nearest: the neighbour k of precision and recall.
        seed: of the subsets.

    Raises:
        ValueError: for a number below 1, or a negative seed.
    """

    batch_size: int = 256
    is_split_size: int = SPLIT_SIZE
    kid_subset_size: int = 1000
    kid_num_subsets: int = 100
    nearest: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "seed" else 1
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")

    def generator(self) -> torch.Generator:
        """A source of subsets for one metric, so that it does not depend on the others that are asked for."""
        return torch.Generator().manual_seed(self.seed)


class Value(NamedTuple):
    """A metric's value, and its standard deviation over splits or subsets, where it has some."""

    mean: float
    std: float | None = None


def _fid(samples: FeatureStatistics, reference: FeatureStatistics, _: EvaluationSettings) -> dict[str, Value]:
    return {"fid": Value(frechet_distance(*samples[:2], *reference[:2]))}


def _sfid(samples: FeatureStatistics, reference: FeatureStatistics, _: EvaluationSettings) -> dict[str, Value]:
    return {"sfid": Value(frechet_distance(*samples[:2], *reference[:2]))}


def _fid_infinity(samples: Tensor, reference: FeatureStatistics, settings: EvaluationSettings) -> dict[str, Value]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report has it
        distance = frechet_distance_infinity(samples, *reference[:2], generator=settings.generator())
    return {"fid_infinity": Value(distance)}


def _inception_score(samples: Tensor, _: None, settings: EvaluationSettings) -> dict[str, Value]:
    return {"is": _summary(split_inception_scores(samples, split_size=settings.is_split_size))}


def _kid(samples: Tensor, reference: Tensor, settings: EvaluationSettings) -> dict[str, Value]:
    size = min(settings.kid_subset_size, len(samples), len(reference))
    count = settings.kid_num_subsets if size < max(len(samples), len(reference)) else 1  # all images: one subset
    generator = settings.generator()
    distances = subset_kernel_distances(reference, samples, subset_size=size, num_subsets=count, generator=generator)
    return {"kid": _summary(distances)}


def _precision_recall(samples: Tensor, reference: Tensor, settings: EvaluationSettings) -> dict[str, Value]:
    found = precision_recall(reference, samples, settings.nearest)
    return {"precision": Value(found.precision), "recall": Value(found.recall)}


def _summary(values: Tensor) -> Value:
    return Value(values.mean().item(), values.std().item() if len(values) > 1 else None)


class Metric(NamedTuple):
    """What a metric is computed from, parts that [`collect`] gathers, and how: several may come from one function."""

    samples: str
    reference: str | None
    compute: Callable[[Any, Any, EvaluationSettings], dict[str, Value]]


METRICS = {
    "fid": Metric("statistics", "statistics", _fid),
    "fid_infinity": Metric("pooled", "statistics", _fid_infinity),
    "is": Metric("probs", None, _inception_score),
    "kid": Metric("pooled", "pooled", _kid),
    "precision": Metric("pooled", "pooled", _precision_recall),
    "recall": Metric("pooled", "pooled", _precision_recall),
    "sfid": Metric("spatial_statistics", "spatial_statistics", _sfid),
}


def evaluate(
    samples: ImageSource,
    reference: Reference,
    extractor: FeatureExtractor,
    metrics: Sequence[str] = ("fid",),
    settings: EvaluationSettings = EvaluationSettings(),
) -> Report:
    """Computes metrics of generated images.

    Args:
        samples: the generated images.
        reference: the real ones; `Reference()` where only the Inception Score is asked for.
        extractor: gives the features.
        metrics: names of [`METRICS`].
        settings: of the metrics.

    Raises:
        ValueError: for a metric that is unknown or needs what is not there; statistics of other features; images that
            cannot be read; features that are not finite. What can be found before going through the images is.
    """
    _check_metrics(metrics, reference)
    first = first_features(samples, extractor)
    _check_features(first, extractor.provenance, metrics)
    if reference.statistics is not None:
        _check_statistics(reference.statistics, first, extractor.provenance, metrics)
    chosen = {name: METRICS[name] for name in metrics}
    needs = {metric.reference for metric in chosen.values() if metric.reference}
    reference_parts = collect_reference(reference, extractor, needs, settings.batch_size)
    sample_parts = collect(samples, extractor, {metric.samples for metric in chosen.values()}, settings.batch_size)
    values: dict[str, Value] = {}
    for name, metric in chosen.items():
        if name not in values:
            values |= metric.compute(
                sample_parts[metric.samples], reference_parts.get(metric.reference or ""), settings
            )
    widths = {name: getattr(first, kind).shape[1] for name, kind in FRECHET.items() if name in metrics}
    return Report(
        metrics={name: values[name].mean for name in metrics},
        spread={name: std for name in metrics if (std := values[name].std) is not None},
        samples={"source": samples.name, "num_images": samples.count, "shape": list(samples.shape)},
        reference=_describe(reference),
        features={**extractor.provenance, "width": first.pooled.shape[1]},
        settings=asdict(settings),
        warnings=_warnings(samples, reference, widths)
        + (_split_warnings(sample_parts["probs"], values["is"]) if "is" in metrics else []),
    )


def _check_metrics(metrics: Sequence[str], reference: Reference) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"`metrics` must be some of {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}.")
    for name in metrics:
        need = METRICS[name].reference
        if need == "pooled" and reference.images is None:
            got = "none" if reference.statistics is None else "only their statistics"
            raise ValueError(f"`reference` must have images for {name}, got {got}.")
        if need in STATISTICS and reference == Reference():
            raise ValueError(f"`reference` must have images or their statistics for {name}, got none.")


def _check_features(first: ImageFeatures, provenance: dict[str, Any], metrics: Sequence[str]) -> None:
    for name in metrics:
        need = STATISTICS.get(METRICS[name].samples, METRICS[name].samples)
        if getattr(first, need) is None:
            what = {"probs": "class probabilities", "spatial": "spatial features"}[need]
            raise ValueError(f"`features` must give {what} for {name}, got none from {provenance['name']!r}.")


def _check_statistics(
    statistics: StatisticsFile, first: ImageFeatures, provenance: dict[str, Any], metrics: Sequence[str]
) -> None:
    """Compares cached statistics with the features that the samples will have."""
    recorded = statistics.features
    pairs = [("a width", len(statistics.pooled.mean), first.pooled.shape[1])]
    if "sfid" in metrics:
        if statistics.spatial is None:
            raise ValueError(f"{statistics.source!r} must have mu_s and sigma_s for sfid; compute it again.")
        assert first.spatial is not None
        pairs.append(("a spatial width", len(statistics.spatial.mean), first.spatial.shape[1]))
    pairs += [(key, recorded.get(key, provenance[key]), provenance[key]) for key in SAME_FEATURES]
    for what, got, expected in pairs:
        if got != expected:
            raise ValueError(
                f"{statistics.source!r} must hold statistics of the features of {provenance['name']!r}, got {what} of "
                f"{got} for {expected}; compute it with these features."
            )


def _describe(reference: Reference) -> dict[str, Any]:
    images, statistics = reference
    described: dict[str, Any] = {} if images is None else {"source": images.name, "num_images": images.count}
    if statistics is not None:
        described["statistics"] = {"source": statistics.source, "num_images": statistics.pooled.num_images}
    return described


def _warnings(samples: ImageSource, reference: Reference, widths: dict[str, int]) -> list[str]:
    """What makes Fréchet distances of these features hard to compare; `widths` are those of the metrics' features."""
    images, statistics = reference
    counts = {"samples": samples.count}
    if statistics is not None and statistics.pooled.num_images is not None:
        counts["reference"] = statistics.pooled.num_images
    elif statistics is None and images is not None:
        counts["reference"] = images.count
    found = [
        f"{name}, {metric}: {text}"
        for metric, width in widths.items()
        for name, count in counts.items()
        if (text := small_sample_warning(count, width))
    ]
    if images is not None and images.shape[1:] != samples.shape[1:]:
        sizes = [" by ".join(map(str, source.shape[1:])) for source in (samples, images)]
        found.append(f"samples have {sizes[0]} pixels and the reference {sizes[1]}: resizing alone tells them apart")
    return found


def _split_warnings(probs: Tensor, score: Value) -> list[str]:
    whole = inception_score(probs, splits=1)
    if score.mean >= SORTED_SPLITS * whole:
        return []
    return [
        f"is: all images together score {whole:.4g}, the splits far less; they are of consecutive images, which must "
        "not be sorted by class"
    ]
