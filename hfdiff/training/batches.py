"""Training batches as a function of their number, and the images that they are drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import LabelledImages, load_images
from ..data.sources import DIGITS
from . import geometry
from .augmentation import Augmentation
from .config import RunSettings, TrainingSettings
from .settings import LabelSettings
from .timesteps import LogSNRSampler, LossSecondMomentSampler


def load_training_data(
    settings: RunSettings, label_column: str | None = None, channels: int | None = None
) -> tuple[LabelledImages, LabelledImages | None]:
    """The images to train on, and those to measure with, if any: the digits' own test part, or `validation_data`'s.

    Args:
        settings: of the run.
        label_column: the column of labels, if they are wanted.
        channels: the fewest that the images are to have.

    Raises:
        ValueError: as [`load_images`]; when the two have other channels, sizes or classes, or are the same file; when
            there are too few images to hold any out.
    """
    load = partial(
        load_images,
        image_column=settings.image_column,
        label_column=label_column,
        labels_from_names=settings.labels_from_names,
        channels=channels,
        resolution=settings.resolution,
        streaming=settings.streaming,
        config_name=settings.dataset_config_name,
    )
    data = load(settings.dataset)
    if settings.hold_out:
        return hold_out(data, settings.hold_out, settings.seed)
    source = settings.validation_data or (DIGITS if settings.dataset == DIGITS else None)
    if source is None:
        return data, None
    if source == settings.dataset and Path(source).is_file():
        raise ValueError(f"`validation_data` must be other images than those of the training, got {source!r} for both.")
    validation = load(source, "test")
    shapes = [tuple(d.images.shape[1:]) for d in (data, validation)]
    if shapes[0] != shapes[1] or data.label_names[: len(validation.label_names)] != validation.label_names:
        raise ValueError(
            f"`validation_data` must have the dataset's shape (C, H, W), {shapes[0]}, and classes, {data.label_names}, "
            f"got {shapes[1]} and {validation.label_names}; use its own test images."
        )
    return data, validation._replace(label_names=data.label_names)


def hold_out(data: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The dataset without a share of its images, and that share: one at random of each 1/share images in a row.

    So a dataset sorted by class keeps some of each class in both.

    Raises:
        ValueError: when there are too few images, or all would be held out.
    """
    count, run = len(data.images), round(1 / share)
    if run < 2 or count < 2 * run:
        raise ValueError(
            f"`hold_out` must leave images on both sides, at most 0.5 and two images of {count}, got {share}; give "
            "another share, or 0."
        )
    first = torch.arange(0, count - run + 1, run)
    held = first + torch.randint(run, first.shape, generator=make_generator(seed, "hold out", 0))
    kept = torch.ones(count, dtype=torch.bool).scatter_(0, held, False).nonzero()[:, 0]
    return data.take(kept), data.take(held)


def choose_flips(settings: LabelSettings, data: LabelledImages) -> bool | Tensor:
    """Which images a run mirrors every second time: all, none, or those of some classes, bool (N,).

    Raises:
        ValueError: for a class that the dataset does not have.
    """
    if not settings.random_flip_classes:
        return settings.random_flip
    assert data.labels is not None
    names, chosen = data.label_names, torch.zeros(len(data.label_names), dtype=torch.bool)
    for given in settings.random_flip_classes:
        name = str(given)
        if name not in names and not (name.isdecimal() and int(name) < len(names)):
            raise ValueError(
                f"`random_flip_classes` must be classes of the dataset, {', '.join(names)}, or their numbers from 0 to "
                f"{len(names) - 1}, got {name!r}; name one of these."
            )
        chosen[names.index(name) if name in names else int(name)] = True
    return chosen[data.labels]


class Batch(NamedTuple):
    """One training batch.

    Args:
        x0: clean images in [-1, 1], (B, C, H, W).
        timestep: t in [0, T), int64, (B,).
        noise: ε, unit normal, (B, C, H, W).
        labels: classes, int64, (B,), or None.
        weight: importance weights of the losses, (B,), or None where t is uniform.
        augment_labels: how each image was changed, (B, 9), as in [`geometry`]; None where none is.
    """

    x0: Tensor
    timestep: Tensor
    noise: Tensor
    labels: Tensor | None
    weight: Tensor | None = None
    augment_labels: Tensor | None = None


@dataclass(frozen=True)
class BatchStream:
    """Training batches as a function of their number: `stream(n)` is the n-th batch, whenever it is asked for.

    Each epoch visits the images once in an order of its own; the last images that fill no batch are left out of it.
    Where classes are balanced, the classes with images are visited in turn, in an order of its own each turn, and the
    images of each class in the same way. So in any number of batches two classes differ by one image at most, and no
    image is seen again before all others of its class.

    Args:
        data: what to draw from.
        batch_size: B.
        num_train_timesteps: T.
        seed: of every draw.
        augmentation: what is done to the images.
        time_sampler: what to draw t by, instead of uniformly; a batch is then a function of its state, too.
        class_dropout: share of the labels that are K, which stands for no class.
        balance_classes: draw every class equally often.
        augment_probability: of each change of [`geometry`], by a generator of its own.
        keep_class: leave out of these changes mirrors and turns, which make one class of another (6 and 9).

    Raises:
        ValueError: when there are fewer images than a batch holds.
    """

    data: LabelledImages
    batch_size: int
    num_train_timesteps: int
    seed: int
    augmentation: Augmentation = Augmentation()  # noqa: RUF009 (it is frozen)
    time_sampler: LossSecondMomentSampler | LogSNRSampler | None = None
    class_dropout: float = 0.0
    balance_classes: bool = False
    augment_probability: float = 0.0
    keep_class: bool = False

    def __post_init__(self) -> None:
        if self.batch_size > len(self.data.images):
            raise ValueError(
                f"`train_batch_size` times the processes must be at most the {len(self.data.images)} images of the "
                f"dataset, got {self.batch_size}; lower it."
            )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.data.images) // self.batch_size

    def __call__(self, number: int) -> Batch:
        """The batch of a number, from 0."""
        index = self._indices(number)
        generator = make_generator(self.seed, "batch", number)
        x0 = self.augmentation(self.data.images, index, generator)
        weight = None
        if self.time_sampler:
            timestep, weight = self.time_sampler.draw(len(x0), generator)
        else:
            timestep = torch.randint(self.num_train_timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        labels = None if self.data.labels is None else self.data.labels[index]
        if labels is not None and self.class_dropout:
            dropped = torch.rand(len(x0), generator=generator) < self.class_dropout
            labels = labels.masked_fill(dropped, len(self.data.label_names))
        augment_labels = None
        if self.augment_probability:
            own = make_generator(self.seed, "augment", number)
            augment_labels = geometry.draw_labels(len(x0), self.augment_probability, own)
            if self.keep_class:
                augment_labels = augment_labels * geometry.KEEPS_CLASS
            x0 = geometry.change(x0, augment_labels)
        return Batch(x0, timestep, noise, labels, weight, augment_labels)

    def _indices(self, number: int) -> Tensor:
        if self.balance_classes:
            places = range(number * self.batch_size, (number + 1) * self.batch_size)
            return torch.tensor([self._balanced[place] for place in places])
        epoch, position = divmod(number, len(self))
        return _order(len(self.data.images), self.seed, epoch)[position * self.batch_size :][: self.batch_size]

    @cached_property
    def _balanced(self) -> "BalancedOrder":
        assert self.data.labels is not None
        return BalancedOrder(self.data.labels, self.seed)


def make_batches(
    settings: TrainingSettings, data: LabelledImages, num_train_timesteps: int, processes: int, **options: Any
) -> BatchStream:
    """The batches of a run, of `train_batch_size` images for each process.

    Args:
        settings: of the run.
        data: what to draw from.
        num_train_timesteps: T.
        processes: how many train.
        options: the others of [`BatchStream`].
    """
    return BatchStream(data, settings.train_batch_size * processes, num_train_timesteps, settings.seed, **options)


class TurnOrder:
    """An endless sequence of values that are visited in turn, each turn in an order of its own.

    Args:
        values: what is visited.
        seed: of the orders.
        purpose: what tells them from others of the seed.
    """

    def __init__(self, values: Sequence[int], seed: int, purpose: str) -> None:
        self.values, self.seed, self.purpose = values, seed, purpose
        self.turn, self.order = -1, [0]

    def __getitem__(self, place: int) -> int:
        """The value at a place, from 0."""
        turn, position = divmod(place, len(self.values))
        if turn != self.turn:
            generator = make_generator(self.seed, self.purpose, turn)
            self.turn, self.order = turn, torch.randperm(len(self.values), generator=generator).tolist()
        return self.values[self.order[position]]


class BalancedOrder:
    """An endless sequence of images, of each class equally often: classes are visited in turn, and the images of each.

    Args:
        labels: of the images, (N,).
        seed: of the order.
    """

    def __init__(self, labels: Tensor, seed: int) -> None:
        present = labels.unique().tolist()
        self.classes = TurnOrder(present, seed, "classes")
        self.images = {
            label: TurnOrder((labels == label).nonzero()[:, 0].tolist(), seed, f"images of class {label}")
            for label in present
        }

    def __getitem__(self, place: int) -> int:
        """The image at a place, from 0."""
        return self.images[self.classes[place]][place // len(self.images)]


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
