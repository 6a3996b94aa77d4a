"""The film of a drawing: panels of images that a visitor plays and scrubs, drawn in the page by `film.js`."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from drawing import Frame

from hfdiff.data.pictures import image_grid, to_pil

HERE = Path(__file__).resolve().parent
COLORS = (  # of curves and of the names of their images
    "#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#d9a514", "#b279a2", "#ff7f9c", "#9d755d", "#8a8f98",
)  # fmt: skip
SMALL = 64  # pixels; smaller images are shown pixel by pixel, without smoothing


def film_player(placeholder: str) -> gr.HTML:
    """Makes what shows a film, whose value [`Film.value`] gives."""
    html, css, js = (HERE.joinpath(f"film.{suffix}").read_text() for suffix in ("html", "css", "js"))
    value = {"panels": [], "placeholder": placeholder}
    return gr.HTML(value, html_template=html, css_template=css, js_on_load=js, elem_classes="film")


@dataclass(frozen=True)
class Panel:
    """Images side by side under a title.

    Args:
        title: above them.
        columns: a name for each image.
        rows: which of the batch they are.
        classes: the class of each, whose probability is told below it; so many for each classifier that is asked.
        colors: of the curves of the same names, where there are some.
        told: what the probabilities are, where there are several of each image.
    """

    title: str
    columns: tuple[str, ...]
    rows: slice
    classes: tuple[tuple[int, ...], ...] = ()
    colors: tuple[str, ...] = ()
    told: str = ""

    def probabilities(self, frame: Frame) -> list[list[float]]:
        """p(y | x_t) of each image's class, by classifier."""
        if frame.probabilities is None:
            return []
        own = frame.probabilities[self.rows]
        return [own[np.arange(len(classes)), list(classes)].tolist() for classes in self.classes]


class Film:
    """Collects the frames of a drawing.

    Args:
        panels: how its images are laid out.
    """

    def __init__(self, panels: Sequence[Panel]) -> None:
        self._panels = [
            {
                "title": panel.title,
                "columns": list(panel.columns),
                "colors": list(panel.colors),
                "told": panel.told,
                "frames": [],
            }
            for panel in panels
        ]
        self._layout = list(zip(panels, self._panels))
        self._pixelated = False

    def add(self, frame: Frame) -> None:
        """Appends a frame."""
        self._pixelated = max(frame.x0.shape[1:3]) < SMALL
        for panel, shown in self._layout:
            strips = {"xt": _strip(frame.xt[panel.rows]), "x0": _strip(frame.x0[panel.rows])}
            notes = ["\n".join(f"{p:.0%}" for p in of_image) for of_image in zip(*panel.probabilities(frame))]
            shown["frames"].append({"caption": frame.caption, "notes": notes, **strips})

    def value(self) -> dict[str, Any]:
        """What the player shows, in JSON values."""
        panels = [{**panel, "frames": list(panel["frames"])} for panel in self._panels]
        return {"panels": panels, "pixelated": self._pixelated}


def color_map(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, again and again."""
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def _strip(images: np.ndarray) -> str:
    """Images side by side without gaps, as a PNG in a data URI."""
    buffer = io.BytesIO()
    image_grid(to_pil(images), columns=len(images), gap=0).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
