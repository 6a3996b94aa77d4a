"""Metrics of a set of images, each network called once per image, with a report of what was compared."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..data.image_source import ImageSource
from .copies import Neighbours
from .feature_set import PIXELS, STATISTICS, Reference, collect, collect_reference, first_features
from .features import FeatureExtractor, ImageFeatures
from .inception_score import inception_score
from .metric_set import LABELS, METRICS, Metric, Value
from .metrics import FEWEST_TO_EXTRAPOLATE, small_sample_warning
from .report import Report
from .settings import COPIES, OF_IMAGES, OF_PIXELS, EvaluationSettings, check_metrics
from .statistics import StatisticsFile

SORTED_SPLITS = 0.8  # of the score of all images: splits that have less are not alike
NOT_ESTIMATED = (
    "{}: not estimated, since the line through the distances of these few images falls below 0; take more images"
)
FRECHET = {"fid": "pooled", "fid_infinity": "pooled", "sfid": "spatial"}  # metrics of known bias, and their features
SAME_FEATURES = ("weights_sha256", "resize")  # of a record of provenance


class Evaluator:
    """Computes metrics of sets of generated images against one reference, which is gone through once.

    Where a set is so small that its FID is biased, FID∞ stands beside it, asked for or not.

    Args:
        reference: the real images; `Reference()` where no metric needs them.
        extractor: gives the features.
        metrics: names of [`METRICS`].
        settings: of the metrics; by default the usual ones.

    Raises:
        ValueError: for a metric that is unknown or needs a reference that is not there, or too few images in it.
    """

    def __init__(
        self,
        reference: Reference,
        extractor: FeatureExtractor,
        metrics: Sequence[str] = ("fid",),
        settings: EvaluationSettings | None = None,
    ) -> None:
        self.reference, self.extractor, self.settings = reference, extractor, settings or EvaluationSettings()
        _check_metrics(metrics, reference, self.settings)
        self.metrics = {name: METRICS[name] for name in metrics}
        self._parts: dict[str, dict[str, Any]] | None = None

    def check_labels(self, labels: Tensor | None, name: str) -> None:
        """Refuses images that lack the classes they were asked to be of, where a metric needs them.

        Raises:
            ValueError: then.
        """
        if labels is None and any(metric.reference == LABELS for metric in self.metrics.values()):
            raise ValueError(
                f"`samples` must have labels for accuracy, got none in {name!r}; sample a pipeline that takes some, or "
                "give an npz file with integers (N,) in arr_1."
            )

    def inputs(self, samples: ImageSource) -> dict[str, Any]:
        """What a report of these images says beside its results; two that agree in it agree in the results.

        Raises:
            ValueError: for images, labels or statistics that do not fit the features and the metrics.
        """
        return self._inputs(samples, self._check(samples))

    def __call__(self, samples: ImageSource) -> Report:
        """Computes the metrics of generated images.

        Raises:
            ValueError: for statistics of other features, labels that are not there, images that cannot be read, or
                features that are not finite. What can be found before going through the images is.
        """
        return self.measure(samples)[0]

    def measure(self, samples: ImageSource) -> tuple[Report, dict[str, Neighbours]]:
        """As a call, with the nearest real images of each sample, by the metrics that look for them."""
        first = self._check(samples)
        real = self._reference_parts()
        metrics = self._with_extrapolation(samples.count, first.pooled.shape[1])
        needs = {metric.samples for metric in metrics.values()}
        parts = collect(samples, self.extractor, needs, self.settings.batch_size)
        values: dict[str, Value] = {}
        for name, metric in metrics.items():
            if name not in values:
                compared = samples.labels if metric.reference == LABELS else _compared(metric, real)
                values |= metric.compute(parts[metric.samples], compared, self.settings)
        widths = {name: getattr(first, kind).shape[1] for name, kind in FRECHET.items() if name in self.metrics}
        report = Report(
            metrics={name: values[name].mean for name in metrics},
            spread={name: std for name in metrics if (std := values[name].std) is not None},
            **self._inputs(samples, first),
            warnings=_warnings(samples, self.reference, widths)
            + [NOT_ESTIMATED.format(name) for name in metrics if values[name].mean is None]
            + (_split_warnings(parts["probs"], values["is"]) if "is" in self.metrics else []),
            beside={name: beside for name in metrics if (beside := values[name].beside) is not None},
        )
        return report, {name: found for name in metrics if (found := values[name].neighbours) is not None}

    def _check(self, samples: ImageSource) -> ImageFeatures:
        """The features of the first images, which fit."""
        self.check_labels(samples.labels, samples.name)
        if any(metric.samples == PIXELS for metric in self.metrics.values()):
            _check_shape("samples", samples, self.reference)
        first = first_features(samples, self.extractor)
        _check_features(first, self.extractor.provenance, list(self.metrics))
        if self.reference.statistics is not None:
            _check_statistics(self.reference.statistics, first, self.extractor.provenance, list(self.metrics))
        return first

    def _with_extrapolation(self, count: int, width: int) -> dict[str, Metric]:
        """The metrics, with FID∞ after the FID of few images; only then, as it keeps all features in memory."""
        if "fid" not in self.metrics or count < FEWEST_TO_EXTRAPOLATE or small_sample_warning(count, width) is None:
            return self.metrics
        names = [*self.metrics]
        names.insert(names.index("fid") + 1, "fid_infinity")
        return {name: METRICS[name] for name in names}

    def _reference_parts(self) -> dict[str, dict[str, Any]]:
        """What the metrics are compared with, of the reference and of the held-out images."""
        if self._parts is None:
            metrics = [metric for metric in self.metrics.values() if metric.reference not in (None, LABELS)]
            needs, size = {str(metric.reference) for metric in metrics}, self.settings.batch_size
            self._parts = {"reference": collect_reference(self.reference, self.extractor, needs, size), "held_out": {}}
            needs = {str(metric.reference) for metric in metrics if metric.held_out}
            if needs and self.reference.held_out is not None:
                self._parts["held_out"] = collect(self.reference.held_out, self.extractor, needs, size)
        return self._parts

    def _inputs(self, samples: ImageSource, first: ImageFeatures) -> dict[str, Any]:
        return {
            "samples": {
                "source": samples.name,
                "num_images": samples.count,
                "shape": list(samples.shape),
                **samples.provenance,
            },
            "reference": _describe(self.reference),
            "features": {**self.extractor.provenance, "width": first.pooled.shape[1]},
            "settings": asdict(self.settings),
        }


def evaluate(
    samples: ImageSource,
    reference: Reference,
    extractor: FeatureExtractor,
    metrics: Sequence[str] = ("fid",),
    settings: EvaluationSettings | None = None,
) -> Report:
    """Computes metrics of generated images.

    Args:
        samples: the generated images.
        reference, extractor, metrics, settings: as in [`Evaluator`].

    Raises:
        ValueError: as [`Evaluator`] does.
    """
    return Evaluator(reference, extractor, metrics, settings)(samples)


def _compared(metric: Metric, real: dict[str, dict[str, Any]]) -> Any:
    """What a metric's second argument is, as [`Metric`] says."""
    part, held_out = (real[kind].get(metric.reference or "") for kind in ("reference", "held_out"))
    return (part, held_out) if metric.held_out else part


def _check_metrics(metrics: Sequence[str], reference: Reference, settings: EvaluationSettings) -> None:
    check_metrics(metrics, has_reference=reference[:2] != (None, None))
    for name in metrics:
        if name in OF_IMAGES and reference.images is None:
            raise ValueError(f"`reference` must have images for {name}, got only their statistics.")
        if name in COPIES and reference.images is not None and reference.images.count < settings.copies_nearest:
            raise ValueError(
                f"`copies_nearest` must be from 2 to the {reference.images.count} images of the reference, got "
                f"{settings.copies_nearest}; all images of the training belong there."
            )
        if name in OF_PIXELS and reference.held_out is not None:
            _check_shape("held_out", reference.held_out, reference)


def _check_shape(name: str, images: ImageSource, reference: Reference) -> None:
    assert reference.images is not None
    if images.shape != reference.images.shape:
        shapes = [" by ".join(map(str, source.shape)) for source in (images, reference.images)]
        raise ValueError(
            f"`{name}` must have the channels, rows and columns of the reference for copies, got {shapes[0]} for "
            f"{shapes[1]}; resize or convert them in the same way, or take copies_features."
        )


def _check_features(first: ImageFeatures, provenance: dict[str, Any], metrics: Sequence[str]) -> None:
    for name in metrics:
        need = STATISTICS.get(METRICS[name].samples, METRICS[name].samples)
        if need != PIXELS and getattr(first, need) is None:
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
    images, statistics, held_out = reference
    described: dict[str, Any] = {} if images is None else {"source": images.name, "num_images": images.count}
    if statistics is not None:
        described["statistics"] = {"source": statistics.source, "num_images": statistics.pooled.num_images}
    if held_out is not None:
        described["held_out"] = {"source": held_out.name, "num_images": held_out.count}
    return described


def _warnings(samples: ImageSource, reference: Reference, widths: dict[str, int]) -> list[str]:
    """What makes Fréchet distances of these features hard to compare; `widths` are those of the metrics' features."""
    images, statistics, _ = reference
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
    assert score.mean is not None
    if score.mean >= SORTED_SPLITS * whole:
        return []
    return [
        f"is: all images together score {whole:.4g}, the splits far less; they are of consecutive images, which must "
        "not be sorted by class"
    ]
