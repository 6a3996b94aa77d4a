"""Images to evaluate, batch by batch, as the bytes that are stored: folders, npz files, datasets, tensors."""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GREY_MODES = ("1", "L")
COLOUR_MODES = ("P", "RGB", "YCbCr", "CMYK")
FEWEST = 2  # images that have a covariance
LABELS, PROVENANCE = "arr_1", "provenance"  # what an npz file may hold beside its images


@dataclass(frozen=True)
class ImageSource:
    """Images of one size.

    Args:
        name: what they are called in reports.
        count: N.
        shape: (C, H, W), C being 1 or 3.
        batches: maps a batch size to the batches, uint8 (B, C, H, W), in an order that does not change.
        labels: the classes that were asked for, integers (N,), where they are known.
        provenance: how the images were made, where that is known, in JSON values.

    Raises:
        ValueError: for fewer than two images.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    batches: Callable[[int], Iterator[Tensor]]
    labels: Tensor | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < FEWEST:
            raise ValueError(f"{self.name!r} must hold at least {FEWEST} images, got {self.count}.")


def open_images(source: str | Path, split: str = "train") -> ImageSource:
    """Opens images and checks what can be checked without decoding them all.

    Args:
        source: a folder of images, also of folders of them; an npz file with arr_0, uint8 (N, H, W, C), and maybe the
            classes in arr_1, integers (N,), as guided-diffusion writes it; or a dataset: a parquet or arrow file, a
            folder of them, or a Hub id.
        split: of a dataset that has some.

    Raises:
        ValueError: where there are no images, or they are of several sizes, not bytes, or cannot be read.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return _open_npz(path)
    if path.is_dir() and not any(path.rglob("*.parquet")) and not any(path.rglob("*.arrow")):
        return _open_folder(path)
    return _open_dataset(str(source), split)


def images_in_memory(
    images: Tensor | np.ndarray, name: str = "images in memory", labels: Tensor | None = None
) -> ImageSource:
    """Images that are there already.

    Args:
        images: uint8, (N, C, H, W).
        name: what they are called in reports.
        labels: the classes that were asked for, integers (N,).

    Raises:
        ValueError: for another type or shape, or fewer than two images.
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"`images` must be uint8 (N, C, H, W) with 1 or 3 channels, got {images.dtype} {tuple(images.shape)}; "
            f"{_remedy(images.dtype, tuple(images.shape), channels=1)}."
        )
    return ImageSource(name, len(images), _shape(images.shape[1:]), lambda size: iter(images.split(size)), labels)


def _open_folder(folder: Path) -> ImageSource:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < FEWEST:
        raise ValueError(
            f"The folder {str(folder)!r} must hold at least {FEWEST} images ({', '.join(SUFFIXES)}), got {len(files)}."
        )
    with ThreadPoolExecutor() as threads:
        heads = list(threads.map(_read_head, files))
    size = heads[0][0]
    for file, (other, _) in zip(files, heads):
        if other != size:
            raise ValueError(
                f"Images must have one size, got {size[0]} by {size[1]} pixels in {str(files[0])!r} and {other[0]} by "
                f"{other[1]} in {str(file)!r}; resize them all in the same way, or leave one out."
            )
    mode = "L" if all(grey for _, grey in heads) else "RGB"
    shape = (1 if mode == "L" else 3, size[1], size[0])
    return ImageSource(str(folder), len(files), shape, partial(_read_files, files, mode))


def _read_head(file: Path) -> tuple[tuple[int, int], bool]:
    """Width and height, and whether the image is grey, without decoding it."""
    try:
        with Image.open(file) as picture:
            if picture.has_transparency_data or picture.mode not in GREY_MODES + COLOUR_MODES:
                raise ValueError(f"mode {picture.mode} has no 8-bit grey or colour alone; convert it to L or RGB")
            return picture.size, picture.mode in GREY_MODES
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _read_files(files: Sequence[Path], mode: str, batch_size: int) -> Iterator[Tensor]:
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(files), batch_size):
            pixels = np.stack(list(threads.map(partial(_decode, mode), files[start : start + batch_size])))
            yield torch.from_numpy(pixels).reshape(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


def _decode(mode: str, file: Path) -> np.ndarray:
    """Pixels, (H, W) or (H, W, 3)."""
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert(mode))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises the last for broken PNG chunks
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"The image {str(file)!r} cannot be read: {error}; replace or remove it.")


def _open_npz(path: Path) -> ImageSource:
    with _first_array(path) as (_, (count, height, width, channels)):
        shape = (channels, height, width)
        with np.load(path) as file:
            labels = file[LABELS] if LABELS in file.files else np.zeros(0)
            provenance = json.loads(str(file[PROVENANCE])) if PROVENANCE in file.files else {}
    classes = torch.from_numpy(labels).long() if labels.shape == (count,) and labels.dtype.kind in "iu" else None
    return ImageSource(str(path), count, shape, partial(_read_npz, path), classes, provenance)


def _read_npz(path: Path, batch_size: int) -> Iterator[Tensor]:
    with _first_array(path) as (stream, (count, *shape)):
        for start in range(0, count, batch_size):
            rows = min(batch_size, count - start)
            pixels = np.frombuffer(stream.read(rows * math.prod(shape)), dtype=np.uint8)
            if pixels.size < rows * math.prod(shape):
                raise EOFError(f"it ends after {start} of {count} images")
            yield torch.from_numpy(pixels.reshape(rows, *shape).copy()).permute(0, 3, 1, 2)


@contextmanager
def _first_array(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int, int]]]:
    """The bytes of arr_0, to be read from front to back, so that files larger than memory can be, and its shape."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            first = np.lib.format.read_magic(stream) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, transposed, dtype = read_header(stream)
            if dtype != np.uint8 or transposed or len(shape) != 4 or shape[3] not in (1, 3):
                raise ValueError(
                    f"arr_0 must be uint8 (N, H, W, C) with 1 or 3 channels, got {dtype} {shape}; "
                    f"{_remedy(dtype, shape, channels=3)}"
                )
            yield stream, (shape[0], shape[1], shape[2], shape[3])
    except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(f"The images of {str(path)!r} cannot be read: {reason}.") from error


def _open_dataset(source: str, split: str) -> ImageSource:
    try:
        from .labelled import load_images
    except ImportError as error:
        raise ValueError(
            f"{source!r} needs the training's packages: {error}; `pip install 'hfdiff[train]'`."
        ) from error
    images = load_images(source, split).images

    def batches(size: int) -> Iterator[Tensor]:
        for start in range(0, len(images), size):
            yield ((images[start : start + size] + 1) * 127.5).round().to(torch.uint8)

    name = source if Path(source).is_file() else f"{source}, {split}"
    return ImageSource(name, len(images), _shape(images.shape[1:]), batches)


def _remedy(dtype: Any, shape: tuple[int, ...], channels: int) -> str:
    """What to do with an array whose type or axes are wrong; its channels belong on the axis `channels`."""
    other = 4 - channels
    if len(shape) == 4 and shape[channels] not in (1, 3) and shape[other] in (1, 3):
        order = "(0, 2, 3, 1)" if channels == 3 else "(0, 3, 1, 2)"
        call = "transpose" if channels == 3 else "permute"
        return f"its channels are on axis {other}: save `images.{call}{order}`"
    if dtype in (np.uint8, torch.uint8):
        return "add or reorder axes"
    return "round floats in [0, 1] with `hfdiff.data.pictures.to_bytes`"


def _shape(sizes: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = sizes
    return channels, height, width
