"""Images drawn from a pipeline to be measured, each by the seed and its index alone.

Image i of a seed has its own stream of noise and its own class, whichever process draws it. Batches are always made of
the same images and computed on one thread, since sums of another order round differently; more processes, not more
threads, use more cores.
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
from .opening import OpenedPipeline, call_parameters, scheduler_class
from .settings import LABEL_POLICIES, SamplingSettings

CLASS_COUNTS = (("classifier", "num_classes"), ("transformer", "num_embeds_ada_norm"), ("unet", "num_class_embeds"))
SEEDS = 2**32  # torch's generators on CPUs read no more of a seed
LABEL_STREAM = -1  # the index whose stream random labels come from


def class_indices(labels: Sequence[int | str], id2label: dict[int, str]) -> list[int | str]:
    """Labels of a command line, as indices where they are names or numbers; others as they are, to be refused."""
    ids = {name: index for index, name in id2label.items()}
    return [ids.get(str(label), int(label) if str(label).isdecimal() else label) for label in labels]


def image_generator(seed: int, index: int) -> torch.Generator:
    """The stream of noise of one image.

    Torch's generators on CPUs tell 2³² seeds apart. Those of a set are consecutive, so no two of its images are alike;
    they begin at a hash of `seed`, so the sets of two seeds hardly ever share an image.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
    return torch.Generator().manual_seed((first + index) % SEEDS)


class Sampler:
    """Draws the images of a set, batch by batch, in any order.

    Args:
        opened: the pipeline.
        settings: what to draw.

    Raises:
        ValueError: for settings that the pipeline does not know.
    """

    def __init__(self, opened: OpenedPipeline, settings: SamplingSettings) -> None:
        self.pipe, self.settings = opened.pipe, settings
        accepted = call_parameters(self.pipe)
        self.labels = self._choose_labels("class_labels" in accepted)
        self.options: dict[str, Any] = {}
        for name in ("guidance_scale", "num_inference_steps"):
            if (value := getattr(settings, name)) is not None:
                if name not in accepted:
                    raise ValueError(f"`{name}` must be left out for a {type(self.pipe).__name__}, got {value}.")
                self.options[name] = value
        self.scheduler = _swapped(opened.scheduler, settings.scheduler)
        if settings.num_inference_steps is not None:
            self.scheduler.set_timesteps(settings.num_inference_steps)  # refuses what it cannot do, now
        self.provenance = self._describe(opened)

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return -(-self.settings.num_images // self.settings.sampling_batch_size)

    def draw(self, batch: int) -> np.ndarray:
        """The images of a batch, uint8, (B, H, W, C).

        Raises:
            ValueError: where the pipeline refuses its arguments, or draws NaN.
        """
        start = batch * self.settings.sampling_batch_size
        rows = range(start, min(start + self.settings.sampling_batch_size, self.settings.num_images))
        options = dict(self.options, generator=[image_generator(self.settings.seed, row) for row in rows])
        if self.labels is None:
            options["batch_size"] = len(rows)
        else:
            options["class_labels"] = self.labels[rows.start : rows.stop].tolist()
        self.pipe.scheduler = self.scheduler
        with _reproducible(self.settings.seed, start):
            images = self.pipe(**options, output_type="np", return_dict=False)[0]
        if not np.isfinite(images).all():
            raise ValueError(
                f"`pipeline` must draw finite images, got NaN among images {rows.start} to {rows.stop - 1}; check its "
                "weights and the scale."
            )
        return to_bytes(images)

    def _choose_labels(self, conditional: bool) -> Tensor | None:
        """The class of each image, (N,); None for a pipeline without classes."""
        policy, count = self.settings.label_policy, self.settings.num_images
        if not conditional:
            if policy is not None:
                raise ValueError(f"`label_policy` must be left out for a {type(self.pipe).__name__}, got {policy!r}.")
            return None
        num_classes = _num_classes(self.pipe)
        if policy == "given":
            config = getattr(getattr(self.pipe, "classifier", None), "config", {})
            id2label = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
            given = class_indices(self.settings.class_labels or (), id2label)
            return label_tensor(given, num_classes, id2label)[torch.arange(count) % len(given)]
        if num_classes is None:
            raise ValueError(
                f'`label_policy` must be "given" for a {type(self.pipe).__name__} that does not say how many classes '
                f"it has, got {policy!r}."
            )
        if policy == "random":
            generator = image_generator(self.settings.seed, LABEL_STREAM)
            return torch.randint(num_classes, (count,), generator=generator)
        return torch.arange(count) % num_classes

    def _describe(self, opened: OpenedPipeline) -> dict[str, Any]:
        """All that the images depend on, and what the report tells of them, in JSON values."""
        settings, kind = self.settings, type(self.scheduler)
        defaults = {name: value.default for name, value in inspect.signature(self.pipe.__call__).parameters.items()}
        defaults["guidance_scale"] = self.pipe.config.get("default_guidance_scale", defaults.get("guidance_scale"))
        return {
            "pipeline": opened.name,
            "pipeline_sha256": opened.sha256,
            "scheduler": f"{kind.__module__.partition('.')[0]}.{kind.__name__}",
            **{name: self.options.get(name, defaults.get(name)) for name in ("num_inference_steps", "guidance_scale")},
            "label_policy": None if self.labels is None else settings.label_policy or LABEL_POLICIES[0],
            "class_labels": list(settings.class_labels) if settings.class_labels else None,
            "seed": settings.seed,
            "num_images": settings.num_images,
            "sampling_batch_size": settings.sampling_batch_size,
            "device": self.pipe.device.type,
        }


def _swapped(own: Any, name: str | None) -> Any:
    if name is None or name.removesuffix("Scheduler") == type(own).__name__.removesuffix("Scheduler"):
        return own
    return scheduler_class(name).from_config(own.config)


def _num_classes(pipe: Any) -> int | None:
    for component, key in CLASS_COUNTS:
        config = getattr(getattr(pipe, component, None), "config", {})
        if hasattr(config, "get") and (count := config.get(key)) is not None:
            return int(count)
    return None


@contextmanager
def _reproducible(seed: int, index: int) -> Iterator[None]:
    """One thread, and a known state of the global streams, which a few schedulers draw from."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(image_generator(seed, index).initial_seed())
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
