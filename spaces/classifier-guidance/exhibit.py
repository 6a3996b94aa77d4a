"""What the tabs have in common: a drawing that is checked, watched, plotted, downloaded, and called by programs."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from itertools import chain
from typing import Any

import gradio as gr
import pandas as pd
import torch
from downloads import files
from drawing import Frame, film
from film import Film, Panel, film_player
from opening import Opened
from zero_gpu import on_gpu

TOGETHER = 1 if torch.cuda.is_available() else os.cpu_count() or 1
SECONDS_BETWEEN = 0.25  # of what is sent to a page while it waits
DRAWING = {"concurrency_id": "drawing", "concurrency_limit": TOGETHER, "preprocess": False}  # `check` sees what came


class Exhibit(ABC):
    """A tab."""

    endpoint: str  # by which programs call it
    plot_count: int

    def __init__(self) -> None:
        self._frames = on_gpu(self._draw)

    @abstractmethod
    def check(self, *inputs: Any) -> Any:
        """The settings that a visitor's inputs are, or a ValueError. It has a `steps`."""

    @abstractmethod
    def opened(self, settings: Any) -> Opened:
        """What it draws from."""

    @abstractmethod
    def pipeline(self, settings: Any) -> Any:
        """A pipeline for one drawing."""

    @abstractmethod
    def arguments(self, settings: Any) -> dict[str, Any]:
        """What it is called with."""

    @abstractmethod
    def snippet(self, settings: Any) -> str:
        """The code that draws the same images."""

    @abstractmethod
    def panels(self, settings: Any) -> list[Panel]:
        """How the images are laid out; each panel is a row of the picture to download."""

    @abstractmethod
    def plots(self, settings: Any, frames: list[Frame]) -> list[pd.DataFrame | gr.LinePlot]:
        """The data of its plots, or what else changes of them, too."""

    @abstractmethod
    def controls(self) -> list[gr.components.Component]:
        """Makes the inputs of [`Exhibit.check`], in order."""

    @abstractmethod
    def plot_components(self) -> list[gr.LinePlot]:
        """Makes the plots, in rows."""

    # --- a click -----------------------------------------------------------------------------------------------------

    def _draw(self, settings: Any) -> Iterator[Frame]:
        yield from film(self.pipeline(settings), **self.arguments(settings))

    def show(self, *inputs: Any) -> Iterator[tuple]:
        """The film as it grows, then also the plots, the code, and the files."""
        with _told():
            settings = self.check(*inputs)
            watched, frames = Film(self.panels(settings)), []
            code, waiting = self.snippet(settings), [gr.skip()] * self.plot_count
            shown = 0.0
            for frame in self._frames(settings):
                frames.append(frame)
                watched.add(frame)
                if time.monotonic() - shown > SECONDS_BETWEEN:
                    yield watched.value(), code, *waiting, gr.skip(), gr.skip()
                    shown = time.monotonic()
            with self._files(settings, frames[-1]) as (picture, archive):
                yield watched.value(), code, *self.plots(settings, frames), picture, archive

    def answer(self) -> Callable[..., Iterator[tuple]]:
        """The function behind the endpoint, with the parameters and the description of [`Exhibit.check`]."""

        @wraps(self.check)
        def answer(*inputs: Any) -> Iterator[tuple]:
            with _told():
                settings = self.check(*inputs)
                *_, last = self._frames(settings)
                report = {**asdict(settings), "model": self.opened(settings).name, "code": self.snippet(settings)}
                by_panel = [panel.probabilities(last) for panel in self.panels(settings)]
                by_guide = [list(chain(*of_panels)) for of_panels in zip(*by_panel)]
                report |= zip(("probabilities", "second_probabilities"), by_guide or [[]])
                with self._files(settings, last) as (picture, archive):
                    yield picture, archive, report

        return answer

    @contextmanager
    def _files(self, settings: Any, frame: Frame) -> Iterator[tuple[str, str]]:
        columns = len(self.panels(settings)[0].columns)
        with files(frame.x0, columns, settings=str(asdict(settings)), probabilities=frame.probabilities) as paths:
            yield paths

    # --- the page ----------------------------------------------------------------------------------------------------

    def build(self, title: str, explanation: str, placeholder: str) -> None:
        """Makes the tab."""
        with gr.Tab(title, elem_id=f"tab-{self.endpoint}"):
            gr.Markdown(explanation, elem_classes="explanation")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    inputs = self.controls()
                    with gr.Row():
                        start = gr.Button("Draw", variant="primary", elem_id=f"draw-{self.endpoint}")
                        stop = gr.Button("Stop", min_width=90, elem_id=f"stop-{self.endpoint}")
                with gr.Column(scale=2, min_width=320):
                    player = film_player(placeholder)
                    plots = self.plot_components()
                    with gr.Row():
                        downloads = [
                            gr.DownloadButton(f"Download {kind}", size="sm", elem_id=f"{kind}-{self.endpoint}")
                            for kind in ("PNG", "npz")
                        ]
                    code = gr.Code(label="The code that draws exactly this", language="python", interactive=False)
            drawing = start.click(
                self.show,
                inputs,
                [player, code, *plots, *downloads],
                api_visibility="private",
                show_progress="minimal",
                show_progress_on=[player],
                **DRAWING,
            )
            stop.click(None, cancels=[drawing], queue=False)
            self._endpoint(inputs)

    def _endpoint(self, inputs: list[gr.components.Component]) -> None:
        outputs = [
            gr.Image(type="filepath", format="png", visible=False, label="picture"),
            gr.File(visible=False, label="images"),
            gr.JSON(visible=False, label="report"),
        ]
        trigger = gr.Button(visible=False)
        trigger.click(self.answer(), inputs, outputs, api_name=self.endpoint, **DRAWING)


@contextmanager
def _told() -> Iterator[None]:
    """Tells the visitor what is wrong with a request."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def seed_control(most: int) -> gr.Number:
    """A seed and a button that throws another."""
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=most, min_width=140, scale=3)
        again = gr.Button("New", size="sm", min_width=64, scale=1)
    again.click(None, outputs=seed, js="() => Math.floor(Math.random() * 1000000)", api_visibility="private")
    return seed
