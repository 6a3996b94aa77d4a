"""Images as files: grids, and conversion to bytes."""

from collections.abc import Sequence

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8, rounded to the nearest level (guided-diffusion truncates); any shape."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Images (N, H, W, C), uint8, as PIL's, of mode L where there is one channel."""
    return DiffusionPipeline.numpy_to_pil(images / np.float32(255))


def image_grid(images: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Images of one size and mode side by side, row by row.

    Args:
        images: the images; the last row may be short.
        columns: images per row.
        scale: whole-number enlargement, without smoothing.
        gap: pixels between images, before enlargement.
    """
    width, height = images[0].size
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    grid = Image.new(images[0].mode, size, color="gray" if images[0].mode == "L" else "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + gap), row * (height + gap)))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)
