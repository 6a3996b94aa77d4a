"""A picture of samples beside their nearest training images, the most suspicious first."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from ..data.image_source import ImageSource
from .copies import Neighbours

CELL, GAP, APART = 96, 8, 24  # pixels: the least side of a picture, between pictures, and between sample and training
LEFT, TOP = 90, 42  # pixels for ratios and titles
DPI = 100
BATCH = 256


def plot_neighbours(
    samples: ImageSource,
    training: ImageSource,
    neighbours: Neighbours,
    threshold: float,
    *,
    rows: int = 8,
    columns: int = 6,
) -> Any:
    """Draws the samples of the smallest ratios, a row each: the ratio, the sample, its nearest training images.

    Args:
        samples: all that were compared.
        training: all that they were compared with.
        neighbours: of each sample.
        threshold: the ratio up to which a sample is a copy; such ratios are red.
        rows: how many samples, at most.
        columns: how many training images, at most.

    Returns:
        A figure of matplotlib.
    """
    from matplotlib.figure import Figure

    ratios = neighbours.ratios
    order = ratios.argsort(stable=True)[:rows]
    nearest = neighbours.indices[order, :columns]
    left, right = _pick(samples, order.tolist()), _pick(training, nearest.flatten().tolist())
    cells = [[left[sample], *(right[index] for index in row)] for sample, row in zip(order.tolist(), nearest.tolist())]
    canvas = _canvas(cells)
    height, width = canvas.shape[:2]
    figure = Figure(figsize=((width + LEFT) / DPI, (height + TOP) / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((LEFT / (width + LEFT), 0, width / (width + LEFT), height / (height + TOP)))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    step = height / len(cells)
    for row, ratio in enumerate(ratios[order].tolist()):
        colour = "tab:red" if ratio <= threshold else "black"
        axes.text(-14, (row + 0.5) * step, f"{ratio:.2f}", ha="right", va="center", color=colour, fontsize=12)
    side = (width - APART - (len(cells[0]) - 1) * GAP) / len(cells[0])
    titles = {
        -14: ("ratio", "right"),
        side / 2: ("sample", "center"),
        side + GAP + APART: ("nearest in training", "left"),
    }
    for place, (text, align) in titles.items():
        axes.text(place, -10, text, ha=align, va="bottom", fontsize=11, color="dimgray")
    return figure


def _pick(source: ImageSource, indices: Iterable[int]) -> dict[int, np.ndarray]:
    """Some of the images, in colour, uint8 (H, W, 3), in one pass."""
    wanted, found, start = set(indices), {}, 0
    for batch in source.batches(BATCH):
        for index in wanted.intersection(range(start, start + len(batch))):
            found[index] = _colour(batch[index - start])
        start += len(batch)
    return found


def _colour(image: Tensor) -> np.ndarray:
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _canvas(cells: list[list[np.ndarray]]) -> np.ndarray:
    """The pictures of all rows on white, the first of each row apart, enlarged by whole numbers to one size."""
    side = max(CELL, *(length for picture in cells[0] for length in picture.shape[:2]))
    across = len(cells[0])
    size = (len(cells) * (side + GAP), across * side + (across - 1) * GAP + APART, 3)
    canvas = np.full(size, 255, dtype=np.uint8)
    for row, pictures in enumerate(cells):
        for column, picture in enumerate(pictures):
            scale = max(1, side // max(picture.shape[:2]))
            large = picture.repeat(scale, axis=0).repeat(scale, axis=1)
            top = row * (side + GAP) + (side + GAP - large.shape[0]) // 2
            place = column * (side + GAP) + (APART if column else 0) + (side - large.shape[1]) // 2
            canvas[top : top + large.shape[0], place : place + large.shape[1]] = large
    return canvas
