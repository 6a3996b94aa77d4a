"""The tab of classifier guidance: images of chosen classes beside what the same noise becomes without guidance."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
import torch
from checks import MOST_SCALE, MOST_SEED, MOST_STEPS, choice, choices, number, whole
from drawing import Frame
from exhibit import Exhibit, seed_control
from film import Panel, color_map
from opening import Opened

from hfdiff.sampling import image_generators

MOST_BOXES = 20  # classes; more are chosen from a list
CURVES = {"x": "step", "y": "p(y | xₜ)", "color": "class", "y_lim": [0, 1], "colors_in_legend": [], "height": 230}


@dataclass(frozen=True)
class Settings:
    """Images of these classes, guided and unguided.

    Args:
        labels: names of classes, one image each.
        guidance_scale: w.
        steps: model calls.
        scheduler: its name.
        seed: of the noise.
        interval: the part of the progress that is guided.
    """

    labels: tuple[str, ...]
    guidance_scale: float
    steps: int
    scheduler: str
    seed: int
    interval: tuple[float, float]


class Guided(Exhibit):
    """One image of each class, guided, then the same noise unguided: 2 N images in one batch."""

    endpoint = "guided"
    plot_count = 2

    def check(
        self,
        labels: Any,
        guidance_scale: Any,
        steps: Any,
        scheduler: Any,
        seed: Any,
        guided_from: Any,
        guided_to: Any,
    ) -> Settings:
        """Draws one image of each class by classifier guidance and, from the same noise, one without it.

        Returns a picture of the guided images above the unguided ones, an npz file of them (uint8, in arr_0), and a
        report with p(y | image) of each and the code that draws the same.

        Args:
            labels: names of classes, 1 to 10, in any order; a name given twice is drawn twice.
            guidance_scale: w, from 0 to 100.
            steps: model calls, from 1 to 100.
            scheduler: one of the names that the page offers.
            seed: of the noise; image i of a seed is the same picture everywhere.
            guided_from: the progress at which guidance sets in, from 0.
            guided_to: the progress after which it ends, to 1.
        """
        interval = (number("Guided from", guided_from, 0, 1), number("Guided to", guided_to, 0, 1))
        if interval[0] > interval[1]:
            raise ValueError(f"Guided from must not be after guided to, got {interval[0]:g} and {interval[1]:g}.")
        return Settings(
            choices("Classes", labels, self.opened.labels),
            number("Guidance scale", guidance_scale, 0, MOST_SCALE),
            whole("Steps", steps, 1, MOST_STEPS),
            choice("Scheduler", scheduler, list(self.opened.schedulers)),
            whole("Seed", seed, 0, MOST_SEED),
            interval,
        )

    def pipeline(self, settings: Settings) -> Any:
        return self.opened.with_scheduler(self.opened.schedulers[settings.scheduler])

    def arguments(self, settings: Settings) -> dict[str, Any]:
        count = len(settings.labels)
        return {
            "class_labels": self._asked(settings) * 2,
            "guidance_scale": torch.tensor([settings.guidance_scale] * count + [0.0] * count),
            "num_inference_steps": settings.steps,
            "guidance_interval": settings.interval,
            "generator": [*image_generators(settings.seed, count), *image_generators(settings.seed, count)],
        }

    def snippet(self, settings: Settings) -> str:
        count = len(settings.labels)
        return f"""{opening_lines(self.opened, settings.scheduler)}
labels = {self._asked(settings)}
images = pipe(
    labels * 2,
    guidance_scale=torch.tensor([{settings.guidance_scale}] * {count} + [0.0] * {count}),  # guided, then not
    num_inference_steps={settings.steps},
    guidance_interval={settings.interval},
    generator=[image_generator({settings.seed}, i % {count}) for i in range({2 * count})],
).images
"""

    def _asked(self, settings: Settings) -> list[int | str]:
        return [self.opened.classes[label] for label in settings.labels]

    def panels(self, settings: Settings) -> list[Panel]:
        count, names = len(settings.labels), settings.labels
        classes = tuple(self.opened.labels.index(label) for label in names)
        known = color_map(self.opened.labels)
        colors = tuple(known[label] for label in names)
        return [
            Panel(f"Guided, scale {settings.guidance_scale:g}", names, slice(0, count), classes, colors),
            Panel("Unguided, the same noise", names, slice(count, 2 * count), classes, colors),
        ]

    def plots(self, settings: Settings, frames: list[Frame]) -> list[pd.DataFrame]:
        return [curves(panel, frames) for panel in self.panels(settings)]

    def controls(self) -> list[gr.components.Component]:
        labels, schedulers = self.opened.labels, list(self.opened.schedulers)
        chosen = [labels[i] for i in (3, 1, 4) if i < len(labels)] or labels[:1]
        few = len(labels) <= MOST_BOXES
        usual = self.opened.pipe.default_guidance_scale
        controls = [
            gr.CheckboxGroup(labels, value=chosen, label="Classes")
            if few
            else gr.Dropdown(labels, value=chosen, label="Classes", multiselect=True),
            gr.Slider(0, max(40, usual), usual, step=0.5, label="Guidance scale w"),
            gr.Slider(1, MOST_STEPS, 25, step=1, label="Steps"),
            gr.Dropdown(schedulers, value=schedulers[0], label="Scheduler"),
            seed_control(MOST_SEED),
        ]
        with gr.Accordion("Guide a part of the way only", open=False):
            controls.append(gr.Slider(0, 1, 0, step=0.05, label="Guided from (0: pure noise)"))
            controls.append(gr.Slider(0, 1, 1, step=0.05, label="Guided to (1: the image)"))
        return controls

    def plot_components(self) -> list[gr.LinePlot]:
        colors = color_map(self.opened.labels)
        return [
            gr.LinePlot(**CURVES, color_map=colors, label=f"p(y | xₜ) by step, {kind}")
            for kind in ("guided", "unguided")
        ]


def curves(panel: Panel, frames: list[Frame], color: str = "class") -> pd.DataFrame:
    """p(y | x_t) of each image's class by the step, the image itself at the end."""
    rows = [
        (frame.step, probability, name)
        for frame in frames
        for name, probability in zip(panel.columns, panel.probabilities(frame))
    ]
    return pd.DataFrame(rows, columns=["step", "p(y | xₜ)", color])


def opening_lines(opened: Opened, scheduler: str) -> str:
    """The code that opens the pipeline and gives it a scheduler."""
    kind, ours, lines = opened.schedulers[scheduler], ["ClassifierGuidedPipeline"], ["import torch"]
    package = kind.__module__.partition(".")[0]
    swapped = kind is not type(opened.pipe.scheduler)
    if swapped and package == "hfdiff":
        ours.insert(0, kind.__name__)
    elif swapped:
        lines.append(f"from {package} import {kind.__name__}")
    lines += [f"from hfdiff import {', '.join(ours)}", "from hfdiff.sampling import image_generator", ""]
    lines += opened.preamble
    lines.append(f"pipe = ClassifierGuidedPipeline.from_pretrained({opened.name!r})")
    if swapped:
        lines.append(f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config)")
    return "\n".join(lines)
