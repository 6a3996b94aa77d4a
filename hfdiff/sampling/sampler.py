"""Images drawn from a pipeline, each by the seed and its index alone.

Image i of a seed has its own stream of noise and its own class, whichever command or process draws it, in whatever
batch. Sums of another order round differently, so sets that are to be the same bytes are drawn in the same batches on
one thread ([`one_thread`]).
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.pictures import to_bytes
from ..pipelines.inputs import label_tensor
from .opening import OpenedPipeline
from .settings import LABEL_POLICIES, SamplingSettings
from .streams import image_generator

LABEL_STREAM = -1  # the index whose stream random labels come from


class Sampler:
    """Draws the images of a set, batch by batch, in any order.

    Args:
        opened: the pipeline.
        settings: what to draw.

    Raises:
        ValueError: for settings that the pipeline does not know.
    """

    def __init__(self, opened: OpenedPipeline, settings: SamplingSettings) -> None:
        self.opened, self.pipe, self.settings = opened, opened.pipe, settings
        self.labels = self._choose_labels()
        self.options: dict[str, Any] = {}
        for name in ("guidance_scale", "num_inference_steps"):
            if (value := getattr(settings, name)) is not None:
                if name not in opened.parameters:
                    raise ValueError(f"`{name}` must be left out for a {type(self.pipe).__name__}, got {value}.")
                self.options[name] = value
        self.scheduler = opened.scheduler_named(settings.scheduler)
        if settings.num_inference_steps is not None:
            self.scheduler.set_timesteps(settings.num_inference_steps)  # refuses what it cannot do, now
        self.provenance = self._describe()

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return -(-self.settings.num_images // self.settings.sampling_batch_size)

    def rows(self, batch: int) -> range:
        """The indices of a batch's images."""
        start = batch * self.settings.sampling_batch_size
        return range(start, min(start + self.settings.sampling_batch_size, self.settings.num_images))

    def draw(self, batch: int) -> np.ndarray:
        """The images of a batch, uint8, (B, H, W, C).

        Raises:
            ValueError: where the pipeline refuses its arguments, or draws NaN.
        """
        rows = self.rows(batch)
        options = dict(self.options, generator=[image_generator(self.settings.seed, row) for row in rows])
        if self.labels is None:
            options["batch_size"] = len(rows)
        else:
            options["class_labels"] = self.labels[rows.start : rows.stop].tolist()
        self.pipe.scheduler = self.scheduler
        with _known_global_stream(self.settings.seed, rows.start):
            images = self.pipe(**options, output_type="np", return_dict=False)[0]
        if not np.isfinite(images).all():
            raise ValueError(
                f"`pipeline` must draw finite images, got NaN among images {rows.start} to {rows.stop - 1}; check its "
                "weights and the scale."
            )
        return to_bytes(images)

    def draw_all(self, progress: bool = False) -> np.ndarray:
        """All images, uint8, (N, H, W, C).

        Args:
            progress: show a bar of each batch's model calls.
        """
        batches = []
        for batch in range(self.num_batches):
            rows = self.rows(batch)
            name = f"Images {rows.start + 1} to {rows.stop} of {self.settings.num_images}, model calls"
            self.pipe.set_progress_bar_config(disable=not progress, desc=name, leave=batch == self.num_batches - 1)
            batches.append(self.draw(batch))
        return np.concatenate(batches)

    def _choose_labels(self) -> Tensor | None:
        """The class of each image, (N,); None for a pipeline without classes."""
        policy, count = self.settings.label_policy, self.settings.num_images
        num_classes, kind = self.opened.num_classes, type(self.pipe).__name__
        if not self.opened.takes_classes:
            if policy is not None:
                name = "class_labels" if policy == "given" else "label_policy"
                raise ValueError(
                    f"`{name}` must be left out for a {kind} without classes, got {getattr(self.settings, name)!r} for "
                    f"{self.opened.name!r}."
                )
            return None
        if policy == "given":
            given = class_indices(self.settings.class_labels or (), self.opened.id2label)
            return label_tensor(given, num_classes, self.opened.id2label)[torch.arange(count) % len(given)]
        if num_classes is None:
            raise ValueError(
                f"`class_labels` must be given for a {kind} that does not say how many classes it has, got none."
            )
        if policy == "random":
            generator = image_generator(self.settings.seed, LABEL_STREAM)
            return torch.randint(num_classes, (count,), generator=generator)
        return torch.arange(count) % num_classes

    def _describe(self) -> dict[str, Any]:
        """All that the images depend on, and what the report tells of them, in JSON values."""
        settings, kind = self.settings, type(self.scheduler)
        defaults = {name: value.default for name, value in inspect.signature(self.pipe.__call__).parameters.items()}
        defaults["guidance_scale"] = getattr(self.pipe, "default_guidance_scale", defaults.get("guidance_scale"))
        return {
            "pipeline": self.opened.name,
            "pipeline_sha256": self.opened.sha256,
            "scheduler": f"{kind.__module__.partition('.')[0]}.{kind.__name__}",
            **{name: self.options.get(name, defaults.get(name)) for name in ("num_inference_steps", "guidance_scale")},
            "label_policy": None if self.labels is None else settings.label_policy or LABEL_POLICIES[0],
            "class_labels": list(settings.class_labels) if settings.class_labels else None,
            "seed": settings.seed,
            "num_images": settings.num_images,
            "sampling_batch_size": settings.sampling_batch_size,
            "device": self.pipe.device.type,
        }


def class_indices(labels: Sequence[int | str], id2label: dict[int, str]) -> list[int | str]:
    """Labels of a command line, as indices where they are names or numbers; others as they are, to be refused."""
    ids = {name: index for index, name in id2label.items()}
    return [ids.get(str(label), int(label) if str(label).isdecimal() else label) for label in labels]


@contextmanager
def _known_global_stream(seed: int, index: int) -> Iterator[None]:
    """A known state of the global streams, which a few schedulers draw from."""
    with torch.random.fork_rng():
        torch.manual_seed(image_generator(seed, index).initial_seed())
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine: more processes, not more threads, then use more cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
