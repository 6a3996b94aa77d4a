"""The tab of guidance scales: one noise, one class, several scales side by side."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
from checks import MOST_SEED, MOST_STEPS, choice, scales, whole
from drawing import Frame
from exhibit import seed_control
from film import Panel, color_map
from guides import CURVES, GuidedExhibit, curves, sampling_controls, second_controls, second_of
from opening import Opened

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
        second_label: of the second classifier; empty where it does not guide.
        second_scale: its w, the same for all.
        model: its name.
    """

    label: str
    scales: tuple[float, ...]
    steps: int
    scheduler: str
    seed: int
    second_label: str
    second_scale: float
    model: str


class Sweep(GuidedExhibit):
    """One image of the class at each scale, from the same noise."""

    endpoint = "sweep"
    plot_count = 3

    def check(
        self,
        label: Any,
        guidance_scales: Any,
        steps: Any,
        scheduler: Any,
        seed: Any,
        second_label: Any,
        second_scale: Any,
        model: Any,
    ) -> Settings:
        """Draws one class from one noise at several guidance scales.

        Returns a picture of the images by ascending scale, an npz file of them (uint8, in arr_0), and a report with
        p(y | image) of each and the code that draws the same.

        Args:
            label: name of the model's class.
            guidance_scales: 1 to 10 guidance scales from 0 to 100.
            steps: model calls, from 1 to 100.
            scheduler: one of the names that the page offers for the model.
            seed: of the noise.
            second_label: of the model's second classifier, where it has one; empty: it does not guide.
            second_scale: w of the second classifier, the same for all images, from 0 to 100.
            model: one of the names that the page offers.
        """
        opened = self.opened_as(model)
        return Settings(
            choice("Class", label, opened.guides[0].labels),
            scales("Guidance scales", guidance_scales),
            whole("Steps", steps, 1, MOST_STEPS),
            choice("Scheduler", scheduler, list(opened.schedulers)),
            whole("Seed", seed, 0, MOST_SEED),
            *second_of(opened, second_label, second_scale),
            model,
        )

    def batch(self, settings: Settings) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
        count = len(settings.scales)
        return (settings.label,) * count, settings.scales, (settings.second_scale,) * count

    def noise(self, settings: Settings) -> list[int]:
        return [0] * len(settings.scales)

    def options(self, settings: Settings) -> dict[str, Any]:
        return {"num_inference_steps": settings.steps}

    def panels(self, settings: Settings) -> list[Panel]:
        names = tuple(f"{scale:g}" for scale in settings.scales)
        colors = tuple(color_map(OFFERED).get(name, "") for name in names)
        second = f" and {settings.second_label}, scale {settings.second_scale:g}" if settings.second_label else ""
        columns = tuple(pull.columns for pull in self.pulls(settings))
        return [
            Panel(
                f"{settings.label}, by guidance scale{second}", names, slice(None), columns, colors, self.told(settings)
            )
        ]

    def plots(self, settings: Settings, frames: list[Frame]) -> list[pd.DataFrame | gr.LinePlot]:
        (panel,) = self.panels(settings)
        by_guide = [
            pd.DataFrame({"scale": settings.scales, "p(y | image)": probabilities, "label": pull.labels})
            for pull, probabilities in zip(self.pulls(settings), panel.probabilities(frames[-1]))
        ]
        of_second = gr.LinePlot(visible=False)
        if settings.second_label:
            name = self.opened(settings).guides[1].name
            of_second = gr.LinePlot(curves(panel, frames, 1, "scale"), label=f"p({name} | xₜ) by step", visible=True)
        return [curves(panel, frames, color="scale"), pd.concat(by_guide), of_second]

    def fitted(self, opened: Opened) -> list[gr.components.Component]:
        labels = opened.guides[0].labels
        return [
            gr.Dropdown(labels, value=labels[min(8, len(labels) - 1)], label="Class"),
            *second_controls(opened),
            *sampling_controls(opened),
        ]

    def controls(self) -> list[gr.components.Component]:
        model, note, fitted = self.model_controls()
        label, second_label, second_scale, steps, scheduler = fitted
        scales = gr.CheckboxGroup(OFFERED, value=OFFERED[:6], label="Guidance scales w")
        seed = seed_control(MOST_SEED)
        self.follow(model, note, fitted)
        return [label, scales, steps, scheduler, seed, second_label, second_scale, model]

    def plot_components(self) -> list[gr.LinePlot]:
        end = {"x": "scale", "y": "p(y | image)", "color": "label", "y_lim": [0, 1], "height": 230}
        by_step = {**CURVES, "color": "scale", "color_map": color_map(OFFERED)}
        with gr.Row():
            plots = [
                gr.LinePlot(**by_step, label="p(y | xₜ) by step"),
                gr.LinePlot(**end, label="p(y | image) by scale"),
            ]
        return [*plots, gr.LinePlot(**by_step, label="p(y | xₜ) by step", visible=False)]
