"""Pipelines to draw from: hfdiff's own and those of diffusers, from a folder, the Hub, or memory."""

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..data.files import files_checksum
from ..pipelines.hub_download import fetch
from ..pipelines.hub_mixin import own_memory
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..pipelines.pipeline_ncsn import NCSNPipeline
from ..pipelines.portable import INDEX
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler

OWN_PIPELINES = {kind.__name__: kind for kind in (ClassifierGuidedPipeline, NCSNPipeline)}
COMPONENT_FILES = (".json", ".safetensors", ".bin")
CLASS_COUNTS = (("transformer", "num_embeds_ada_norm"), ("unet", "num_class_embeds"))  # of pipelines of diffusers


@dataclass(frozen=True)
class OpenedPipeline:
    """A pipeline to draw from.

    Args:
        pipe: takes `generator`, and `batch_size` or `class_labels`.
        name: its folder or Hub id, for reports.
        sha256: of its components' files, for reports.

    Raises:
        ValueError: for a pipeline that needs more than noise and classes.
    """

    pipe: Any
    name: str = "a pipeline in memory"
    sha256: str | None = None
    scheduler: Any = field(init=False)  # its own, which others are made from

    def __post_init__(self) -> None:
        if "generator" not in self.parameters or not {"batch_size", "class_labels"} & self.parameters:
            raise ValueError(
                f"`pipeline` must draw from noise or from class labels, got {type(self.pipe).__name__} of "
                f"{self.name!r}; sample it yourself and measure the images."
            )
        object.__setattr__(self, "scheduler", self.pipe.scheduler)

    @property
    def parameters(self) -> set[str]:
        """What a call of it takes."""
        return set(inspect.signature(self.pipe.__call__).parameters)

    @property
    def num_classes(self) -> int | None:
        """K; None for a pipeline without classes, or one that does not say."""
        if isinstance(self.pipe, ClassifierGuidedPipeline):
            return self.pipe.num_classes
        for component, key in CLASS_COUNTS:
            config = getattr(getattr(self.pipe, component, None), "config", {})
            if "class_labels" in self.parameters and config.get(key) is not None:
                return int(config[key])
        return None

    @property
    def id2label(self) -> dict[int, str]:
        """Names of its classes; empty where they have none."""
        return self.pipe.id2label if isinstance(self.pipe, ClassifierGuidedPipeline) else {}

    @property
    def takes_classes(self) -> bool:
        """Whether it draws by class."""
        if isinstance(self.pipe, ClassifierGuidedPipeline):
            return self.pipe.classifier is not None or self.num_classes is not None
        return "class_labels" in self.parameters

    def scheduler_named(self, name: str | None) -> Any:
        """Its own scheduler, or another made from its config.

        Args:
            name: as of [`scheduler_class`]; None, or its own class name, is its own.
        """
        own = self.scheduler
        if name is None or name.removesuffix("Scheduler") == type(own).__name__.removesuffix("Scheduler"):
            return own
        kind = scheduler_class(name)
        known = {*kind._get_init_keys(kind), "_class_name", "_use_default_values"}  # of others diffusers would warn
        return kind.from_config({key: value for key, value in own.config.items() if key in known})


def open_pipeline(source: str, device: torch.device | str = "cpu") -> OpenedPipeline:
    """Loads a pipeline: one of hfdiff's, or one of diffusers' that draws from noise or from classes.

    Raises:
        ValueError: where there is none, or it needs more than noise and classes.
        OSError: where it cannot be downloaded or loaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(fetch(source))
    elif not (folder / INDEX).is_file():
        raise ValueError(f"`pipeline` must be a folder with {INDEX} or the Hub id of a pipeline, got {source!r}.")
    entry = json.loads((folder / INDEX).read_text())["_class_name"]
    kind = OWN_PIPELINES.get(entry if isinstance(entry, str) else entry[-1], diffusers.DiffusionPipeline)
    pipe = kind.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    own_memory(pipe)
    files = sorted(path for path in folder.glob("*/*") if path.suffix in COMPONENT_FILES)
    return OpenedPipeline(pipe, source, files_checksum(files))


def scheduler_class(name: str) -> type[diffusers.SchedulerMixin]:
    """A scheduler of diffusers, or "AnnealedLangevin", by its class name with or without its "Scheduler"."""
    known = {key: getattr(diffusers, key) for key in dir(diffusers) if key.endswith("Scheduler")}
    known[AnnealedLangevinScheduler.__name__] = AnnealedLangevinScheduler
    for candidate in (name, f"{name}Scheduler"):
        if candidate in known:
            return known[candidate]
    raise ValueError(
        f"`scheduler` must be a scheduler of diffusers or AnnealedLangevin, got {name!r}; choose among "
        f"{', '.join(known)}."
    )
