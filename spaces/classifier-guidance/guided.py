"""The tab of classifier guidance: images of chosen classes beside what the same noise becomes without guidance."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from checks import MOST_SCALE, MOST_SEED, MOST_STEPS, choice, choices, number, whole
from drawing import Frame
from exhibit import seed_control
from film import Panel, color_map
from guides import (
    CURVES,
    GuidedExhibit,
    curves,
    sampling_controls,
    scale_slider,
    second_controls,
    second_of,
)
from opening import Opened

KINDS = ("guided", "unguided")
MOST_BOXES = 20  # classes; more are chosen from a list


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
        second_label: of the second classifier for all images; empty where it does not guide.
        second_scale: its w.
        model: its name.
    """

    labels: tuple[str, ...]
    guidance_scale: float
    steps: int
    scheduler: str
    seed: int
    interval: tuple[float, float]
    second_label: str
    second_scale: float
    model: str


class Guided(GuidedExhibit):
    """One image of each class, guided, then the same noise unguided: 2 N images in one batch."""

    endpoint = "guided"
    plot_count = 4

    def check(
        self,
        labels: Any,
        guidance_scale: Any,
        steps: Any,
        scheduler: Any,
        seed: Any,
        guided_from: Any,
        guided_to: Any,
        second_label: Any,
        second_scale: Any,
        model: Any,
    ) -> Settings:
        """Draws one image of each class by classifier guidance and, from the same noise, one without it.

        Returns a picture of the guided images above the unguided ones, an npz file of them (uint8, in arr_0), and a
        report with p(y | image) of each and the code that draws the same.

        Args:
            labels: names of the model's classes, 1 to 10, in any order; a name given twice is drawn twice.
            guidance_scale: w, from 0 to 100.
            steps: model calls, from 1 to 100.
            scheduler: one of the names that the page offers for the model.
            seed: of the noise; image i of a seed is the same picture everywhere.
            guided_from: the progress at which guidance sets in, from 0.
            guided_to: the progress after which it ends, to 1.
            second_label: of the model's second classifier, where it has one, for all images; empty: it does not guide.
            second_scale: w of the second classifier, from 0 to 100.
            model: one of the names that the page offers.
        """
        opened = self.opened_as(model)
        interval = (number("Guided from", guided_from, 0, 1), number("Guided to", guided_to, 0, 1))
        if interval[0] > interval[1]:
            raise ValueError(f"Guided from must not be after guided to, got {interval[0]:g} and {interval[1]:g}.")
        return Settings(
            choices("Classes", labels, opened.guides[0].labels),
            number("Guidance scale", guidance_scale, 0, MOST_SCALE),
            whole("Steps", steps, 1, MOST_STEPS),
            choice("Scheduler", scheduler, list(opened.schedulers)),
            whole("Seed", seed, 0, MOST_SEED),
            interval,
            *second_of(opened, second_label, second_scale),
            model,
        )

    def batch(self, settings: Settings) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
        count = len(settings.labels)
        scales, second_scales = (
            (scale,) * count + (0.0,) * count for scale in (settings.guidance_scale, settings.second_scale)
        )
        return settings.labels * 2, scales, second_scales

    def noise(self, settings: Settings) -> list[int]:
        return [*range(len(settings.labels))] * 2

    def options(self, settings: Settings) -> dict[str, Any]:
        return {"num_inference_steps": settings.steps, "guidance_interval": settings.interval}

    def panels(self, settings: Settings) -> list[Panel]:
        count, names, pulls = len(settings.labels), settings.labels, self.pulls(settings)
        known = color_map(pulls[0].guide.labels)
        colors = tuple(known[label] for label in names)
        title = f"Guided, scale {settings.guidance_scale:g}"
        if settings.second_label:
            title += f"; {settings.second_label}, scale {settings.second_scale:g}"
        return [
            Panel(title, names, rows, tuple(pull.columns[rows] for pull in pulls), colors, self.told(settings))
            for title, rows in (
                (title, slice(0, count)),
                ("Unguided, the same noise", slice(count, 2 * count)),
            )
        ]

    def plots(self, settings: Settings, frames: list[Frame]) -> list[gr.LinePlot]:
        panels, guides = self.panels(settings), [pull.guide for pull in self.pulls(settings)]
        colors = color_map(guides[0].labels)
        main = [gr.LinePlot(curves(panel, frames), color_map=colors) for panel in panels]
        if len(guides) == 1:
            return [*main, gr.LinePlot(visible=False), gr.LinePlot(visible=False)]
        second = [
            gr.LinePlot(
                curves(panel, frames, 1),
                color_map=colors,
                label=f"p({guides[1].name} | xₜ) by step, {kind}",
                visible=True,
            )
            for panel, kind in zip(panels, KINDS)
        ]
        return [*main, *second]

    def fitted(self, opened: Opened) -> list[gr.components.Component]:
        labels = opened.guides[0].labels
        chosen = [label for label in ("3", "1", "4") if label in labels] or labels[:3]
        few = len(self.first.guides[0].labels) <= MOST_BOXES
        return [
            gr.CheckboxGroup(labels, value=chosen, label="Classes")
            if few
            else gr.Dropdown(labels, value=chosen, label="Classes", multiselect=True),
            scale_slider(opened),
            *second_controls(opened),
            *sampling_controls(opened),
        ]

    def controls(self) -> list[gr.components.Component]:
        model, note, fitted = self.model_controls()
        labels, scale, second_label, second_scale, steps, scheduler = fitted
        seed = seed_control(MOST_SEED)
        with gr.Accordion("Guide a part of the way only", open=False):
            begin = gr.Slider(0, 1, 0, step=0.05, label="Guided from (0: pure noise)")
            end = gr.Slider(0, 1, 1, step=0.05, label="Guided to (1: the image)")
        self.follow(model, note, fitted)
        return [labels, scale, steps, scheduler, seed, begin, end, second_label, second_scale, model]

    def plot_components(self) -> list[gr.LinePlot]:
        plots = []
        for visible in (True, False):  # of the first classifier, of the second
            with gr.Row():
                plots += [
                    gr.LinePlot(**CURVES, color="class", label=f"p(y | xₜ) by step, {kind}", visible=visible)
                    for kind in KINDS
                ]
        return plots
