"""What metrics are computed from: features, probabilities and statistics of a set of images, gathered in one pass."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.image_source import ImageSource, open_images
from .features import FeatureExtractor, ImageFeatures
from .statistics import RunningStatistics, StatisticsFile, load_statistics

PIXELS = "pixels"  # the part that needs no network
STATISTICS = {"statistics": "pooled", "spatial_statistics": "spatial"}  # the parts kept as sums, and what they sum


class Reference(NamedTuple):
    """The real images; where both fields are given, the statistics are what FID and sFID use, as in guided-diffusion.

    Args:
        images: for metrics that compare single images.
        statistics: that were computed before, maybe of more images.
        held_out: real images that nothing was trained on, which say how many pass for copies by chance.
    """

    images: ImageSource | None = None
    statistics: StatisticsFile | None = None
    held_out: ImageSource | None = None


def open_reference(
    source: str | Path, split: str = "train", held_out: str | Path | None = None, held_out_split: str = "test"
) -> Reference:
    """Opens real images, or their statistics, or a file of both, like guided-diffusion's reference batches.

    Args:
        source: as in [`open_images`], or an npz file of statistics.
        split: of a dataset that has some.
        held_out: images that nothing was trained on, as in [`open_images`].
        held_out_split: of theirs.

    Raises:
        ValueError: for neither, or what cannot be read.
    """
    path = Path(source)
    names: list[str] = []
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    statistics = load_statistics(path) if "mu.npy" in names else None
    images = open_images(source, split) if statistics is None or "arr_0.npy" in names else None
    return Reference(images, statistics, None if held_out is None else open_images(held_out, held_out_split))


@torch.no_grad()
def first_features(source: ImageSource, extractor: FeatureExtractor) -> ImageFeatures:
    """The features of the first two images, to see what an extractor gives before all images are gone through."""
    return extractor(next(source.batches(2)))


@torch.no_grad()
def collect(source: ImageSource, extractor: FeatureExtractor, parts: set[str], batch_size: int = 256) -> dict[str, Any]:
    """Goes through the images once.

    Args:
        source: the images.
        extractor: gives the features.
        parts: what to gather, each by its name: "pooled" (N, D), "probs" (N, K), "pixels", uint8 (N, C·H·W), and
            "statistics" and "spatial_statistics", which take no memory that grows with N.
        batch_size: images per call of the extractor.

    Raises:
        ValueError: for images that cannot be read, or features that are not finite.
    """
    running = {name: RunningStatistics() for name in STATISTICS if name in parts}
    rows: dict[str, list[Tensor]] = {name: [] for name in parts - running.keys()}
    total = -(-source.count // batch_size)
    for batch in tqdm(source.batches(batch_size), desc=source.name, total=total, delay=5):
        found = {PIXELS: batch.flatten(1)}
        if parts != {PIXELS}:
            found |= extractor(batch)._asdict()
        for name, statistics in running.items():
            statistics.update(found[STATISTICS[name]].cpu())
        for name, kept in rows.items():
            kept.append(found[name].cpu())
    finished = {name: statistics.finish() for name, statistics in running.items()}
    return finished | {name: torch.cat(kept) for name, kept in rows.items()}


def collect_reference(
    reference: Reference, extractor: FeatureExtractor, parts: set[str], batch_size: int = 256
) -> dict[str, Any]:
    """As [`collect`], with cached statistics in the place of those of the images, where there are some."""
    cached: dict[str, Any] = {}
    if reference.statistics is not None:
        cached = {"statistics": reference.statistics.pooled, "spatial_statistics": reference.statistics.spatial}
    missing = parts - cached.keys()
    if not missing or reference.images is None:
        return cached
    return cached | collect(reference.images, extractor, missing, batch_size)


def compute_statistics(source: ImageSource, extractor: FeatureExtractor, batch_size: int = 256) -> StatisticsFile:
    """Statistics of images to keep in a file: of the pooled features, and of the spatial ones where there are some.

    Raises:
        ValueError: for images that cannot be read, or features that are not finite.
    """
    spatial = first_features(source, extractor).spatial is not None
    parts = collect(source, extractor, set(STATISTICS) if spatial else {"statistics"}, batch_size)
    return StatisticsFile(parts["statistics"], parts.get("spatial_statistics"), extractor.provenance, source.name)
