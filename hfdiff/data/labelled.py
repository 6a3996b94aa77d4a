"""Labelled images, (N, C, H, W) in [-1, 1], from a file, a folder, the Hub or scikit-learn."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .images import StoredPictures, gather, select, to_pixels
from .sources import DIGITS, check_column, load_digits, open_dataset, read_file_labels, read_labels

SIDES_READ = 500  # pictures, at most, that tell the size of a dataset's


def spread_rows(total: int, count: int) -> Tensor:
    """At most so many of the numbers below `total`, spread evenly, int64."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


class LabelledImages(NamedTuple):
    """A dataset.

    Args:
        images: float32 in [-1, 1], (N, C, H, W), in memory or decoded as they are indexed; C is 1 where every image is
            grey, else 3.
        labels: int64, (N,); None where no column of labels was asked for.
        label_names: one per class.
    """

    images: Any  # an `ImageSet`, or a tensor
    labels: Tensor | None
    label_names: list[str]

    def take(self, rows: Tensor) -> "LabelledImages":
        """Some of the images, by their numbers (N,), read as before."""
        labels = None if self.labels is None else self.labels[rows]
        return LabelledImages(select(self.images, rows), labels, self.label_names)

    def spread(self, count: int) -> "LabelledImages":
        """At most so many of the images, in memory, spread evenly: a set sorted by class keeps all its classes."""
        rows = spread_rows(len(self.images), count)
        return LabelledImages(self.images[rows], None if self.labels is None else self.labels[rows], self.label_names)


def load_images(
    source: str,
    split: str = "train",
    *,
    image_column: str = "image",
    label_column: str | None = None,
    labels_from_names: bool = False,
    resolution: int | None = None,
    channels: int | None = None,
    streaming: bool | None = None,
    config_name: str | None = None,
) -> LabelledImages:
    """Opens a dataset and makes sure that each of its images can be read.

    Args:
        source: "digits" (scikit-learn's), a local parquet or arrow file, a folder of them or of images in a folder per
            class, or a Hub id.
        split: "train" or "test"; a file is taken whole as either.
        image_column: the column of images.
        label_column: the column of labels, if they are wanted.
        labels_from_names: where labels are wanted, take them from the names of the images' files, up to the first "_".
        resolution: the shorter side to resize to, of which a square is then cropped; None keeps the images' own.
        channels: 3 makes colour images of grey ones; by default grey images stay grey where all are.
        streaming: decode images as they are indexed, instead of once into memory; None does so above 2 GiB.
        config_name: which configuration, where a folder or Hub dataset has several.

    Raises:
        ValueError: for a dataset or column that is not there, an image that cannot be read, images of several sizes, or
            labels that are not classes.
    """
    if source == DIGITS:
        pictures, labels, names = load_digits(split)
        digits = gather(
            lambda rows: [to_pixels(pictures[row], resolution) for row in rows], len(pictures), resolution, channels
        )
        return LabelledImages(digits, labels, names)
    dataset = open_dataset(source, split, config_name)
    check_column(dataset, "image_column", image_column, source)
    classes: tuple[Tensor | None, list[str]] = (None, [])
    if label_column is not None and labels_from_names:
        classes = read_file_labels(dataset, image_column, source)
    elif label_column is not None:
        check_column(dataset, "label_column", label_column, source)
        classes = read_labels(dataset, label_column)
    read = StoredPictures(dataset, image_column, source, resolution)
    return LabelledImages(gather(read, len(dataset), resolution, channels, streaming=streaming), *classes)


def median_side(
    source: str, split: str = "train", *, image_column: str = "image", config_name: str | None = None
) -> int:
    """The median of the pictures' shorter sides, in pixels, of some hundreds spread over a dataset.

    Args:
        source: as [`load_images`] takes it, with the following.
        split: "train" or "test".
        image_column: the column of images.
        config_name: which configuration, where there are several.

    Raises:
        ValueError: as [`load_images`].
    """
    if source == DIGITS:
        return min(load_digits(split)[0][0].size)
    dataset = open_dataset(source, split, config_name)
    check_column(dataset, "image_column", image_column, source)
    arrays = StoredPictures(dataset, image_column, source, None)(spread_rows(len(dataset), SIDES_READ).tolist())
    return int(torch.tensor([min(array.shape[:2]) for array in arrays]).median())
