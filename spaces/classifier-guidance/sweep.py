"""The tab of guidance scales: one noise, one class, several scales side by side."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
import torch
from checks import MOST_SEED, MOST_STEPS, choice, scales, whole
from drawing import Frame
from exhibit import Exhibit, seed_control
from film import Panel, color_map
from guided import CURVES, curves, opening_lines

from hfdiff.sampling import image_generator

OFFERED = ["0", "1", "2", "4", "8", "16", "32", "64"]


@dataclass(frozen=True)
class Settings:
    """One class at several scales.

    Args:
        label: name of the class.
        scales: w, ascending, one image each.
        steps: model calls.
        scheduler: its name.
        seed: of the noise, the same for all.
    """

    label: str
    scales: tuple[float, ...]
    steps: int
    scheduler: str
    seed: int


class Sweep(Exhibit):
    """One image of the class at each scale, from the same noise."""

    endpoint = "sweep"
    plot_count = 2

    def check(self, label: Any, guidance_scales: Any, steps: Any, scheduler: Any, seed: Any) -> Settings:
        """Draws one class from one noise at several guidance scales.

        Returns a picture of the images by ascending scale, an npz file of them (uint8, in arr_0), and a report with
        p(y | image) of each and the code that draws the same.

        Args:
            label: name of the class.
            guidance_scales: 1 to 10 guidance scales from 0 to 100.
            steps: model calls, from 1 to 100.
            scheduler: one of the names that the page offers.
            seed: of the noise.
        """
        return Settings(
            choice("Class", label, self.opened.labels),
            scales("Guidance scales", guidance_scales),
            whole("Steps", steps, 1, MOST_STEPS),
            choice("Scheduler", scheduler, list(self.opened.schedulers)),
            whole("Seed", seed, 0, MOST_SEED),
        )

    def pipeline(self, settings: Settings) -> Any:
        return self.opened.with_scheduler(self.opened.schedulers[settings.scheduler])

    def arguments(self, settings: Settings) -> dict[str, Any]:
        count = len(settings.scales)
        return {
            "class_labels": [self.opened.classes[settings.label]] * count,
            "guidance_scale": torch.tensor(settings.scales),
            "num_inference_steps": settings.steps,
            "generator": [image_generator(settings.seed, 0) for _ in range(count)],
        }

    def snippet(self, settings: Settings) -> str:
        return f"""{opening_lines(self.opened, settings.scheduler)}
scales = torch.tensor({list(settings.scales)})
images = pipe(
    [{self.opened.classes[settings.label]!r}] * len(scales),
    guidance_scale=scales,
    num_inference_steps={settings.steps},
    generator=[image_generator({settings.seed}, 0) for _ in scales],
).images
"""

    def panels(self, settings: Settings) -> list[Panel]:
        classes = (self.opened.labels.index(settings.label),) * len(settings.scales)
        names = tuple(f"{scale:g}" for scale in settings.scales)
        colors = tuple(color_map(OFFERED).get(name, "") for name in names)
        return [Panel(f"{settings.label}, by guidance scale", names, slice(None), classes, colors)]

    def plots(self, settings: Settings, frames: list[Frame]) -> list[pd.DataFrame]:
        (panel,) = self.panels(settings)
        end = pd.DataFrame({"scale": settings.scales, "p(y | image)": panel.probabilities(frames[-1])})
        return [curves(panel, frames, "scale"), end]

    def controls(self) -> list[gr.components.Component]:
        labels, schedulers = self.opened.labels, list(self.opened.schedulers)
        return [
            gr.Dropdown(labels, value=labels[min(8, len(labels) - 1)], label="Class"),
            gr.CheckboxGroup(OFFERED, value=OFFERED[:6], label="Guidance scales w"),
            gr.Slider(1, MOST_STEPS, 25, step=1, label="Steps"),
            gr.Dropdown(schedulers, value=schedulers[0], label="Scheduler"),
            seed_control(MOST_SEED),
        ]

    def plot_components(self) -> list[gr.LinePlot]:
        end = {"x": "scale", "y": "p(y | image)", "y_lim": [0, 1], "height": 230}
        return [
            gr.LinePlot(
                **{**CURVES, "color": "scale"},
                color_map=color_map(OFFERED),
                label="p(y | xₜ) by step",
            ),
            gr.LinePlot(**end, label="p(y | image) by scale"),
        ]
