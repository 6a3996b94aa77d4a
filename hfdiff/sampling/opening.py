"""Pipelines to draw from: hfdiff's own and those of diffusers, from a folder or the Hub."""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from ..data.files import files_checksum
from ..pipelines.hub_download import fetch
from ..pipelines.hub_mixin import own_memory
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..pipelines.pipeline_ncsn import NCSNPipeline
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler

INDEX = "model_index.json"


OWN_PIPELINES = {kind.__name__: kind for kind in (ClassifierGuidedPipeline, NCSNPipeline)}


COMPONENT_FILES = (".json", ".safetensors", ".bin")


class OpenedPipeline(NamedTuple):
    """A pipeline to draw from.

    Args:
        pipe: takes `generator`, and `batch_size` or `class_labels`.
        name: its folder or Hub id.
        sha256: of its components' files.
        scheduler: its own, which others are made from.
    """

    pipe: Any
    name: str
    sha256: str
    scheduler: Any


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
    accepted = call_parameters(pipe)
    if "generator" not in accepted or not {"batch_size", "class_labels"} & accepted:
        raise ValueError(
            f"`pipeline` must draw from noise or from class labels, got {type(pipe).__name__} of {source!r}; sample it "
            "yourself and measure the images."
        )
    own_memory(pipe)
    files = sorted(path for path in folder.glob("*/*") if path.suffix in COMPONENT_FILES)
    return OpenedPipeline(pipe, source, files_checksum(files), pipe.scheduler)


def scheduler_class(name: str) -> type[diffusers.SchedulerMixin]:
    """A scheduler of diffusers, or "AnnealedLangevin", by its class name with or without its "Scheduler"."""
    known = {key: getattr(diffusers, key) for key in dir(diffusers) if key.endswith("Scheduler")}
    known[AnnealedLangevinScheduler.__name__] = AnnealedLangevinScheduler
    for candidate in (name, f"{name}Scheduler"):
        if candidate in known:
            return known[candidate]
    raise ValueError(
        f"`--scheduler` must be a scheduler of diffusers or AnnealedLangevin, got {name!r}; choose among "
        f"{', '.join(known)}."
    )


def call_parameters(pipe: Any) -> set[str]:
    return set(inspect.signature(pipe.__call__).parameters)
