"""Images in memory, and training batches drawn from them as a function of their number.

Images are (N, C, H, W) in [-1, 1]. Nothing here keeps a random state: whatever is drawn comes from a generator seeded
by the run's seed, the purpose and a number, so a resumed run draws what an uninterrupted one would have drawn.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Image, load_dataset
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

GREY_MODES = ("1", "L")
FLOAT_MODE = "F"  # Pillow's 32-bit float images: already in [-1, 1] here
NUM_DIGITS_TO_TRAIN = 1500  # of scikit-learn's 1,797; the later ones are of other writers


class LabelledImages(NamedTuple):
    """A dataset in memory.

    Args:
        images: float32 in [-1, 1], (N, C, H, W); C is 1 where every image is grey, else 3.
        labels: int64, (N,); None where no column of labels was asked for.
        label_names: one per class.
    """

    images: Tensor
    labels: Tensor | None
    label_names: list[str]


def load_images(
    source: str,
    split: str = "train",
    *,
    image_column: str = "image",
    label_column: str | None = None,
    resolution: int | None = None,
) -> LabelledImages:
    """Decodes a dataset into memory.

    Args:
        source: "digits" (scikit-learn's), a local parquet file, a local folder of parquet files or images, or a Hub id.
        split: "train" or "test"; a file is taken whole as either.
        image_column: the column of images.
        label_column: the column of labels, if they are wanted.
        resolution: height and width to resize to, after a centred crop to a square; None keeps the images' own.

    Raises:
        ValueError: for a file or column that is not there, images of several sizes, or labels that are not classes.
    """
    if source == "digits":
        pictures, labels, names = _digits(split)
        return LabelledImages(_stack(pictures, resolution), labels, names)
    dataset = _open(source, split)
    for name, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"`{name}` must be one of {dataset.column_names} of {source!r}, got {column!r}.")
    pictures = dataset.select_columns([image_column]).cast_column(image_column, Image())[image_column]
    images = _stack(pictures, resolution)
    return LabelledImages(images, *(_labels(dataset, label_column) if label_column else (None, [])))


def _open(source: str, split: str) -> Dataset:
    if not source.endswith(".parquet"):
        return load_dataset(source, split=split)
    if not Path(source).is_file():
        raise ValueError(f"Expected a dataset at {source!r}, got no such file; check the path.")
    return load_dataset("parquet", data_files={split: source}, split=split)


def _digits(split: str) -> tuple[list[PILImage.Image], Tensor, list[str]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    part = slice(None, NUM_DIGITS_TO_TRAIN) if split == "train" else slice(NUM_DIGITS_TO_TRAIN, None)
    pixels = (digits.images[part] / 8 - 1).astype(np.float32)  # grey levels 0..16
    pictures = [PILImage.fromarray(picture) for picture in pixels]
    return pictures, torch.from_numpy(digits.target[part]).long(), [str(name) for name in digits.target_names]


def _labels(dataset: Dataset, column: str) -> tuple[Tensor, list[str]]:
    """Labels (N,) and the names of the classes; integers name themselves."""
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel) and "int" not in str(getattr(feature, "dtype", "")):
        raise ValueError(
            f"`label_column` must hold class labels, got {column!r} of {feature}; convert it with "
            "`dataset.class_encode_column`."
        )
    labels = torch.tensor(dataset[column][:], dtype=torch.int64)
    if (labels < 0).any():
        raise ValueError(f"`label_column` must label every image, got negative labels in {column!r}; drop those rows.")
    names = feature.names if isinstance(feature, ClassLabel) else [str(i) for i in range(int(labels.max()) + 1)]
    return labels, list(names)


def _stack(pictures: Iterable[PILImage.Image], resolution: int | None) -> Tensor:
    """Square images of one size as (N, C, H, W); grey ones among colours become colours."""
    arrays = [_pixels(picture, resolution) for picture in pictures]
    sizes = {array.shape[:2] for array in arrays}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise ValueError(
            f"Images must be square and of one size, got (height, width) of {sorted(sizes)[:4]}; give a `resolution`."
        )
    if len({array.ndim for array in arrays}) > 1:
        arrays = [array if array.ndim == 3 else np.stack([array] * 3, axis=-1) for array in arrays]
    images = torch.from_numpy(np.stack(arrays))
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _pixels(picture: PILImage.Image, resolution: int | None) -> np.ndarray:
    """One image in [-1, 1] as (H, W) or (H, W, 3); transparency is laid on white."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture)
    if picture.mode != FLOAT_MODE:
        picture = picture.convert("L" if picture.mode in GREY_MODES else "RGB")
    if resolution and picture.size != (resolution, resolution):
        picture = ImageOps.fit(picture, (resolution, resolution), PILImage.Resampling.BILINEAR)
    array = np.asarray(picture, dtype=np.float32)
    return array if picture.mode == FLOAT_MODE else array / 127.5 - 1


class Batch(NamedTuple):
    """One training batch.

    Args:
        x0: clean images in [-1, 1], (B, C, H, W).
        timestep: t, uniform in [0, T), int64, (B,).
        noise: ε, unit normal, (B, C, H, W).
        labels: classes, int64, (B,), or None.
    """

    x0: Tensor
    timestep: Tensor
    noise: Tensor
    labels: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.x0.to(device), self.timestep.to(device), self.noise.to(device), labels)


@dataclass(frozen=True)
class BatchStream:
    """Training batches as a function of their number: `stream(n)` is the n-th batch, whenever it is asked for.

    Each epoch visits the images once in an order of its own; the last images that fill no batch are left out of it.

    Args:
        data: what to draw from.
        batch_size: B.
        num_train_timesteps: T.
        seed: of every draw.
        shift: move each image by up to this many pixels each way, over a background of -1.

    Raises:
        ValueError: when there are fewer images than a batch holds.
    """

    data: LabelledImages
    batch_size: int
    num_train_timesteps: int
    seed: int
    shift: int = 0

    def __post_init__(self) -> None:
        if self.batch_size > len(self.data.images):
            raise ValueError(
                f"`train_batch_size` must be at most the {len(self.data.images)} images of the dataset, "
                f"got {self.batch_size}."
            )

    def __call__(self, number: int) -> Batch:
        """The batch of a number, from 0."""
        index = self._indices(number)
        x0 = self.data.images[index]
        generator = make_generator(self.seed, "batch", number)
        if self.shift:
            x0 = random_shift(x0, self.shift, generator)
        timestep = torch.randint(self.num_train_timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        return Batch(x0, timestep, noise, None if self.data.labels is None else self.data.labels[index])

    def _indices(self, number: int) -> Tensor:
        count = len(self.data.images)
        epoch, position = divmod(number, count // self.batch_size)
        return _order(count, self.seed, epoch)[position * self.batch_size :][: self.batch_size]


@lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, (count,)."""
    return torch.randperm(count, generator=make_generator(seed, "order", epoch))


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of 32 bits, all that torch's CPU generator reads, for one of many draws of a run."""
    return int(np.random.SeedSequence([seed, *purpose.encode(), number]).generate_state(1)[0])


def make_generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator for one draw of a run: draws of another purpose or number are independent of it."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, number))


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Moves each image by -pixels to pixels in both directions, over a background of -1; (B, C, H, W) to the same."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, value=-1.0)
    top, left = torch.randint(2 * pixels + 1, (2, batch, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    image, channel = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
