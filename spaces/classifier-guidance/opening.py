"""The pipelines a visitor draws from: what a variable names, and those that came with the page."""

import os
import threading
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from hfdiff import AnnealedLangevinScheduler, ClassifierGuidedPipeline, NCSNPipeline
from hfdiff.pipelines.hub_download import bundled_source
from hfdiff.pipelines.several_classifiers import joint_scales, members_of

BUNDLED = {
    "Digits": "hfdiff/mnist-classifier-guided",
    "Emoji": "hfdiff/emoji-classifier-guided",
    "NCSN digits": "hfdiff/mnist-ncsn-guided",
}
NOT_OPENED = (OSError, ValueError, KeyError, TypeError, AttributeError)

OTHER_SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler,
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "Annealed Langevin": AnnealedLangevinScheduler,
}


@dataclass(frozen=True)
class Guide:
    """A classifier of a pipeline.

    Args:
        name: its name among several; empty where it is the only one.
        classes: what it is asked for, by the label shown: a name, or an index where classes have no names.
        scale: its usual w.
        first: where its classes begin among the probabilities of all.
    """

    name: str
    classes: dict[str, int | str]
    scale: float
    first: int

    @property
    def labels(self) -> list[str]:
        """The labels of the classes, in order."""
        return list(self.classes)


@dataclass(frozen=True)
class Opened:
    """A pipeline and where it is from.

    Args:
        pipe: never called itself: [`Opened.with_scheduler`] gives each drawing one of its own.
        name: a Hub id, or a folder.
        note: what a visitor should know of that; empty where it is what was asked for.
    """

    pipe: Any
    name: str
    note: str

    @property
    def guides(self) -> list[Guide]:
        """Its classifiers, in order."""
        members, first, guides = members_of(self.pipe.classifier), 0, []
        scales = joint_scales(None, members) if members else {"": self.pipe.default_guidance_scale}
        for name, classifier in (members or {"": self.pipe.classifier}).items():
            classes = _classes(classifier)
            guides.append(Guide(name, classes, float(scales[name]), first))
            first += len(classes)
        return guides

    @property
    def preamble(self) -> list[str]:
        """The line of code without which other machines would round another way."""
        if self.pipe.device.type != "cpu":
            return []
        return ["torch.set_num_threads(1)  # as the page does; sums in another order round differently"]

    @property
    def schedulers(self) -> dict[str, type]:
        """Those that sample from this model, by name; its own comes first."""
        own = type(self.pipe.scheduler)
        if own is AnnealedLangevinScheduler:
            return {"Annealed Langevin": own}
        return {own.__name__.removesuffix("Scheduler"): own, **OTHER_SCHEDULERS}

    def with_scheduler(self, kind: type, **config: Any) -> Any:
        """A pipeline of the same networks with a scheduler of its own, whose state no other drawing touches."""
        scheduler = kind.from_config(self.pipe.scheduler.config, **config)
        pipe = type(self.pipe).from_pipe(self.pipe, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe


class Models:
    """Guided pipelines by the name shown, each opened when it is first asked for.

    One after the other: diffusers opens models with `torch.nn.Module` changed for all threads.

    Args:
        first: one that is open.
    """

    def __init__(self, first: Opened) -> None:
        names = {source: name for name, source in BUNDLED.items()}
        self._opened = {names.get(first.name, first.name): first}
        self._opening = threading.Lock()
        self.names = list(dict.fromkeys([*self._opened, *BUNDLED]))

    def __getitem__(self, name: str) -> Opened:
        """One of the names.

        Raises:
            ValueError: where it does not open.
        """
        if name not in self._opened:
            with self._opening:
                if name not in self._opened:
                    self._opened[name] = self._open(name)
        return self._opened[name]

    def _open(self, name: str) -> Opened:
        try:
            return open_bundled(ClassifierGuidedPipeline, BUNDLED[name])
        except NOT_OPENED as error:
            raise ValueError(f"{name} did not open, so choose another model. ({_in_one_line(error)})") from error


def open_pipelines() -> tuple[Models, Opened]:
    """The guided pipelines, of which that of HFDIFF_MODEL is the first, and the score network of HFDIFF_NCSN_MODEL."""
    first = _open(ClassifierGuidedPipeline, "HFDIFF_MODEL", BUNDLED["Digits"])
    return Models(first), _open(NCSNPipeline, "HFDIFF_NCSN_MODEL", "hfdiff/mnist-ncsn")


def open_bundled(kind: Any, name: str, note: str = "") -> Opened:
    """A pipeline that came with the page, of which the Hub is not asked; one that did not is fetched from there."""
    return Opened(_on_device(kind.from_pretrained(bundled_source(name))), name, note)


def _open(kind: Any, variable: str, usual: str) -> Opened:
    """The pipeline that a variable names, else the usual one."""
    wanted, note = os.environ.get(variable), ""
    if wanted:
        try:
            return Opened(_on_device(kind.from_pretrained(wanted)), wanted, "")
        except NOT_OPENED as error:
            reason = _in_one_line(error)
            note = f"`{wanted}` did not open, so this page draws with the pipeline that came with it. ({reason})"
    return open_bundled(kind, usual, note)


def _classes(classifier: Any) -> dict[str, int | str]:
    named = bool(classifier.config.id2label)
    return {name: name if named else index for index, name in sorted(classifier.id2label.items())}


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _on_device(pipe: Any) -> Any:
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")
