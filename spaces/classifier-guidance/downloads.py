"""Drawn images as files."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hfdiff.data.pictures import image_grid, to_pil

SHOWN = 96  # pixels, the least side of an image in a picture


@contextmanager
def files(images: np.ndarray, columns: int, **arrays: Any) -> Iterator[tuple[str, str]]:
    """A picture of all images and an npz file of them, which are gone afterwards.

    Args:
        images: (N, H, W, C) uint8, `arr_0` of the npz file.
        columns: images in a row of the picture.
        arrays: what else goes into the npz file.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture, archive = Path(folder, "images.png"), Path(folder, "images.npz")
        image_grid(to_pil(images), columns, scale=max(1, SHOWN // images.shape[2])).save(picture)
        np.savez(archive, images, **{name: np.asarray(value) for name, value in arrays.items()})
        yield str(picture), str(archive)
