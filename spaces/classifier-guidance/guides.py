"""What the tabs of guided pipelines have in common: the choice of a model, and one or two classifiers that guide it."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
import torch
from checks import MOST_SCALE, MOST_STEPS, choice, number, optional
from drawing import Frame
from exhibit import Exhibit
from film import Panel
from opening import Guide, Models, Opened

from hfdiff import AnnealedLangevinScheduler
from hfdiff.sampling import image_generator

USUAL_STEPS, USUAL_LANGEVIN_STEPS = 25, 50
HIGHEST_SCALE = 40.0  # of a slider
NOBODY = "any"  # what is shown for no label
CURVES = {"x": "step", "y": "p(y | xₜ)", "y_lim": [0, 1], "colors_in_legend": [], "height": 230}


@dataclass(frozen=True)
class Pull:
    """What one classifier draws the images of a batch towards.

    Args:
        guide: the classifier.
        labels: of its classes, one per image.
        scales: w of each image.
    """

    guide: Guide
    labels: tuple[str, ...]
    scales: tuple[float, ...]

    @property
    def asked(self) -> list[int | str]:
        """The labels as the pipeline takes them."""
        return [self.guide.classes[label] for label in self.labels]

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of the labels among the probabilities."""
        return tuple(self.guide.first + self.guide.labels.index(label) for label in self.labels)


class GuidedExhibit(Exhibit):
    """A tab of guided images.

    Its settings have a `model`, `scheduler`, `steps` and `seed`, and of the second classifier, where there are several,
    a `second_label`, empty where it is not to guide, and a `second_scale`.

    Args:
        models: those to choose from.
    """

    def __init__(self, models: Models) -> None:
        super().__init__()
        self.models = models
        self.first = models[models.names[0]]

    @abstractmethod
    def batch(self, settings: Any) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
        """The first classifier's label for each image, its w, and that of the second."""

    @abstractmethod
    def noise(self, settings: Any) -> list[int]:
        """Which image of the seed each of the batch begins as."""

    @abstractmethod
    def options(self, settings: Any) -> dict[str, Any]:
        """What else the pipeline is called with."""

    @abstractmethod
    def fitted(self, opened: Opened) -> list[gr.components.Component]:
        """The controls that a model decides about: made on the page, or what becomes of them."""

    # --- a drawing ---------------------------------------------------------------------------------------------------

    def opened_as(self, model: Any) -> Opened:
        """The model of a name, which is checked."""
        return self.models[choice("Model", model, self.models.names)]

    def opened(self, settings: Any) -> Opened:
        return self.models[settings.model]

    def pipeline(self, settings: Any) -> Any:
        opened = self.opened(settings)
        return opened.with_scheduler(opened.schedulers[settings.scheduler])

    def pulls(self, settings: Any) -> list[Pull]:
        """What the classifiers draw the batch towards."""
        guides, (labels, scales, second_scales) = self.opened(settings).guides, self.batch(settings)
        pulls = [Pull(guides[0], labels, scales)]
        if settings.second_label:
            pulls.append(Pull(guides[1], (settings.second_label,) * len(labels), second_scales))
        return pulls

    def told(self, settings: Any) -> str:
        """What the numbers below an image are, where there are several."""
        names = [pull.guide.name for pull in self.pulls(settings)]
        return ", ".join(f"p({name} | xₜ)" for name in names) if len(names) > 1 else ""

    def arguments(self, settings: Any) -> dict[str, Any]:
        pulls = self.pulls(settings)
        return {
            "class_labels": _by_name({pull.guide.name: pull.asked for pull in pulls}),
            "guidance_scale": _by_name({pull.guide.name: torch.tensor(pull.scales) for pull in pulls}),
            **self.options(settings),
            "generator": [image_generator(settings.seed, index) for index in self.noise(settings)],
        }

    def snippet(self, settings: Any) -> str:
        pulls, options = self.pulls(settings), self.options(settings)
        labels = {pull.guide.name: _list_code(pull.asked) for pull in pulls}
        scales = {pull.guide.name: f"torch.tensor({list(pull.scales)})" for pull in pulls}
        lines = [f"    {name}={value!r},\n" for name, value in options.items()]
        return f"""{opening_lines(self.opened(settings), settings.scheduler)}
labels = {_code_by_name(labels)}
scales = {_code_by_name(scales)}
images = pipe(
    labels,
    guidance_scale=scales,
{"".join(lines)}    generator=[image_generator({settings.seed}, i) for i in {_list_code(self.noise(settings))}],
).images
"""

    # --- the page ----------------------------------------------------------------------------------------------------

    def model_controls(self) -> tuple[gr.Radio, gr.Markdown, list[gr.components.Component]]:
        """The choice of a model, a place for a note about it, and the controls that fit it."""
        names = self.models.names
        model = gr.Radio(names, value=names[0], label="Model", elem_id=f"model-{self.endpoint}")
        note = gr.Markdown(visible=False, elem_classes="note")
        return model, note, self.fitted(self.first)

    def follow(self, model: gr.Radio, note: gr.Markdown, fitted: list[gr.components.Component]) -> None:
        """Makes the controls follow the model."""
        model.input(
            self.choose, model, [model, note, *fitted], api_visibility="private", show_progress="hidden",
            preprocess=False, concurrency_limit=None,
        )  # fmt: skip

    def choose(self, model: Any) -> tuple:
        """The model, a note and the controls; those of the first model where the chosen one does not open."""
        told = ""
        try:
            opened = self.opened_as(model)
        except ValueError as error:
            model, opened, told = self.models.names[0], self.first, str(error)
        return model, gr.Markdown(told, visible=bool(told)), *self.fitted(opened)


def second_of(opened: Opened, label: Any, scale: Any) -> tuple[str, float]:
    """Label and scale of the second classifier, checked; the label is empty where it is not to guide."""
    labels = [label for guide in opened.guides[1:2] for label in guide.labels]
    return optional("Second label", label, labels), number("Second scale", scale, 0, MOST_SCALE)


def scale_slider(opened: Opened) -> gr.Slider:
    """w of the first classifier."""
    main = opened.guides[0]
    label = f"Scale w of the {main.name}" if main.name else "Guidance scale w"
    return gr.Slider(0, max(HIGHEST_SCALE, main.scale), main.scale, step=0.5, label=label)


def second_controls(opened: Opened) -> list[gr.components.Component]:
    """Label and scale of the second classifier, hidden where there is none."""
    several, guide = len(opened.guides) > 1, opened.guides[-1]
    choices = [(NOBODY, ""), *((label, label) for label in guide.labels if several)]
    return [
        gr.Radio(choices, value="", label=guide.name.capitalize() or "Second label", visible=several),
        gr.Slider(
            0, max(HIGHEST_SCALE, guide.scale), guide.scale, step=0.5, visible=several,
            label=f"Scale w of the {guide.name}",
        ),
    ]  # fmt: skip


def sampling_controls(opened: Opened) -> list[gr.components.Component]:
    """Steps and scheduler."""
    schedulers = list(opened.schedulers)
    langevin = isinstance(opened.pipe.scheduler, AnnealedLangevinScheduler)
    return [
        gr.Slider(1, MOST_STEPS, USUAL_LANGEVIN_STEPS if langevin else USUAL_STEPS, step=1, label="Steps"),
        gr.Dropdown(schedulers, value=schedulers[0], label="Scheduler"),
    ]


def curves(panel: Panel, frames: list[Frame], guide: int = 0, color: str = "class") -> pd.DataFrame:
    """p(y | x_t) of each image's class by the step, the image itself at the end, of one of the classifiers."""
    rows = [
        (frame.step, probability, name)
        for frame in frames
        for name, probability in zip(panel.columns, panel.probabilities(frame)[guide])
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


def _by_name(parts: dict[str, Any]) -> Any:
    """A dictionary by classifier; a lone classifier's part as it is."""
    return parts.get("", parts)


def _code_by_name(parts: dict[str, str]) -> str:
    """The code of [`_by_name`]."""
    return parts[""] if "" in parts else f"{{{', '.join(f'{name!r}: {code}' for name, code in parts.items())}}}"


def _list_code(values: Sequence[Any]) -> str:
    """The code of a list, short where it repeats itself."""
    count = len(values)
    period = next(p for p in range(1, count + 1) if count % p == 0 and list(values[:p]) * (count // p) == list(values))
    repeated = f" * {count // period}" if period < count else ""
    return f"{list(values[:period])!r}{repeated}"
