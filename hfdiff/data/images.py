"""Pictures as arrays: decoding, cropping, and what is drawn anew for each batch.

Pixels are kept as bytes, (H, W) or (H, W, 3), the shorter side being the images' size; they become float32 squares in
[-1, 1], (B, C, H, W), when a batch asks for them. So a dataset that is decoded at the start and one that is decoded
batch by batch give the same numbers.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

GREY_MODES = ("1", "L", "LA", "La")
FLOAT_MODE = "F"  # Pillow's 32-bit float images: here in [-1, 1], and never from a file
UNSCALED_MODES = ("I", FLOAT_MODE)  # numbers in a file that do not say which of them is white
ROWS_AT_ONCE = 256
MEMORY_LIMIT = 2 * 2**30  # bytes of pixels that are kept; more are decoded batch by batch
CENTRE = (0.5, 0.5)

Read = Callable[[Sequence[int]], list[np.ndarray]]


class ImageSet:
    """The square images of a dataset, float32 in [-1, 1]; its `shape` and indices are those of a tensor (N, C, H, W).

    Args:
        read: gives the pixels of rows.
        count: N.
        channels: C; 1 where every image is grey, else 3.
        size: H and W.
    """

    def __init__(self, read: Read, count: int, channels: int, size: int) -> None:
        self.read = read
        self.shape = torch.Size((count, channels, size, size))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """The centred squares of an index, a slice or a tensor of indices; one index gives (C, H, W)."""
        rows = torch.arange(len(self))[index]
        images = self.crop(rows.flatten(), torch.tensor(CENTRE).expand(rows.numel(), 2))
        return images.view(*rows.shape, *self.shape[1:])

    def crop(self, index: Tensor, position: Tensor) -> Tensor:
        """Squares of images.

        Args:
            index: of the images, (B,).
            position: where each square lies, (B, 2): from 0, topmost or leftmost, to 1, the other end.
        """
        places = position.tolist()
        squares = [self._square(pixels, place) for pixels, place in zip(self.read(index.tolist()), places, strict=True)]
        stacked = torch.from_numpy(np.stack(squares))
        images = stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()
        return images if images.is_floating_point() else images.float() / 127.5 - 1

    def _square(self, pixels: np.ndarray, place: Sequence[float]) -> np.ndarray:
        channels, size = self.shape[1:3]
        if pixels.shape[:2] != (size, size):
            top, left = (min(int(p * (side - size + 1)), side - size) for p, side in zip(place, pixels.shape))
            pixels = pixels[top : top + size, left : left + size]
        grey = pixels.ndim == 2
        return np.broadcast_to(pixels[..., None], (size, size, channels)) if grey and channels > 1 else pixels


def gather(
    read: Read,
    count: int,
    resolution: int | None = None,
    channels: int | None = None,
    *,
    streaming: bool | None = None,
) -> ImageSet:
    """Decodes every image once, to be sure of each before the training, and keeps them where they fit.

    Args:
        read: gives the pixels of rows.
        count: N.
        resolution: the size the pixels were brought to, if any.
        channels: the fewest the images are to have.
        streaming: decode again for each batch instead of keeping; None does so above `MEMORY_LIMIT` bytes.

    Raises:
        ValueError: for images of several sizes or, where they were not resized, that are not square.
    """
    kept: list[np.ndarray] | None = None if streaming else []
    size, channels, total = min(read([0])[0].shape[:2]), channels or 1, 0
    for start in tqdm(range(0, count, ROWS_AT_ONCE), desc="Decoding images", unit_scale=ROWS_AT_ONCE, delay=5):
        for row, array in enumerate(read(range(start, min(start + ROWS_AT_ONCE, count))), start):
            if array.shape[:2] != (size, size) and resolution is None:
                raise ValueError(
                    f"Images must be squares of one size, here {size} by {size}, got {array.shape[0]} by "
                    f"{array.shape[1]} pixels in row {row}; give a `resolution`."
                )
            channels = max(channels, 1 if array.ndim == 2 else array.shape[2])
            total += array.nbytes
            if kept is not None:
                kept.append(array)
        if streaming is None and total > MEMORY_LIMIT:
            kept = None
    return ImageSet(read if kept is None else partial(_pick, kept), count, channels, size)


def select(images: Any, rows: Tensor) -> Any:
    """Some images of an [`ImageSet`], or of a tensor, by their numbers (N,); those of a set are read when asked for."""
    if isinstance(images, Tensor):
        return images[rows]
    numbers, (_, channels, size, _) = rows.tolist(), images.shape
    return ImageSet(lambda asked: images.read([numbers[row] for row in asked]), len(numbers), channels, size)


def _pick(arrays: list[np.ndarray], rows: Sequence[int]) -> list[np.ndarray]:
    return [arrays[row] for row in rows]


class StoredPictures:
    """Reads pixels from a dataset's column of pictures, in threads.

    Args:
        dataset: of the column.
        column: pictures, as files or bytes; the dataset's feature of it is ignored.
        source: name of the dataset, for messages.
        resolution: the shorter side of what is read; None keeps the pictures' own.

    Raises:
        ValueError: when a picture is missing or cannot be read; it names the row.
    """

    def __init__(self, dataset: Dataset, column: str, source: str, resolution: int | None) -> None:
        try:
            self.table = dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False))
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"`image_column` must hold pictures, got {column!r} of {dataset.features[column]} in {source!r}; "
                "name another column."
            ) from error
        self.column, self.source, self.resolution = column, source, resolution
        self.threads = ThreadPoolExecutor()

    def __call__(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The pixels of rows."""
        return list(self.threads.map(self._read, rows, self.table[list(rows)][self.column]))

    def _read(self, row: int, stored: dict[str, Any] | None) -> np.ndarray:
        where = f"row {row} of column {self.column!r} in {self.source!r}"
        if stored is None:
            raise ValueError(f"Every row must have a picture, got none in {where}; drop the row.")
        try:
            picture = ImageFeature().decode_example(stored)
            if picture.mode in UNSCALED_MODES:
                raise ValueError(f"pixels of mode {picture.mode} have no scale; save them with 8 or 16 bits")
            return to_pixels(picture, self.resolution)
        except Exception as error:  # each of Pillow's decoders has its own
            reason = str(error).partition(" <_io")[0] or type(error).__name__
            raise ValueError(
                f"Every picture must be readable, got {where}, {stored.get('path') or 'bytes'}: {reason}; "
                "replace it or drop the row."
            ) from error


def to_pixels(picture: Image.Image, resolution: int | None) -> np.ndarray:
    """The pixels of a picture, (H, W) or (H, W, 3), its shorter side brought to `resolution`.

    They are bytes, or float32 for a picture of floats. Transparency is laid on white; 16 bits are rounded to 8.
    """
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    grey = picture.mode in GREY_MODES
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode != FLOAT_MODE:
        picture = picture.convert("L" if grey else "RGB")
    if resolution and min(picture.size) != resolution:
        shorter = min(picture.size)
        width, height = (resolution * side // shorter for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)
