"""The pipelines a visitor draws from: what a variable names, else those that came with the page."""

import os
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from hfdiff import AnnealedLangevinScheduler, ClassifierGuidedPipeline, NCSNPipeline
from hfdiff.pipelines.hub_download import bundled_source

OTHER_SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler,
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "Annealed Langevin": AnnealedLangevinScheduler,
}


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
    def classes(self) -> dict[str, int | str]:
        """What the pipeline is asked for, by the label shown: a name, or an index where classes have no names."""
        classifier = self.pipe.classifier
        named = bool(classifier.config.id2label)
        return {name: name if named else index for index, name in sorted(classifier.id2label.items())}

    @property
    def labels(self) -> list[str]:
        """The labels of the classes, in order."""
        return list(self.classes)

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


def open_pipelines() -> tuple[Opened, Opened]:
    """The guided pipeline of HFDIFF_MODEL and the score network of HFDIFF_NCSN_MODEL.

    One after the other: diffusers opens models with `torch.nn.Module` changed for all threads.
    """
    guided = _open(ClassifierGuidedPipeline, "HFDIFF_MODEL", "mnist-classifier-guided")
    return guided, _open(NCSNPipeline, "HFDIFF_NCSN_MODEL", "mnist-ncsn")


def _open(kind: Any, variable: str, usual: str) -> Opened:
    """The pipeline that a variable names, else the one that came with the page, of which the Hub is not asked."""
    bundled, wanted, note = f"hfdiff/{usual}", os.environ.get(variable), ""
    if wanted:
        try:
            return Opened(_on_device(kind.from_pretrained(wanted)), wanted, "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            note = f"`{wanted}` did not open, so this page draws with the pipeline that came with it. ({reason})"
    return Opened(_on_device(kind.from_pretrained(bundled_source(bundled))), bundled, note)


def _on_device(pipe: Any) -> Any:
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")
