"""Drawing with a film of it: the pipeline works in a thread and reports; a generator passes its reports on.

A drawing that nobody waits for any more, on a page that was stopped or closed, ends at its next step.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfdiff import AnnealedLangevinScheduler
from hfdiff.data.pictures import to_bytes
from hfdiff.pipelines.outputs import draws_from_zero
from hfdiff.pipelines.several_classifiers import members_of

MOST_FRAMES = 24
FEWEST_FRAMES = 4
FILM_VALUES = 2**18  # of all frames together, beyond which there are fewer of them


@dataclass(frozen=True)
class Frame:
    """What is to be seen of one step, or of the images at the end.

    Args:
        step: from 1; the images at the end are one more than `steps`.
        steps: how many there are.
        caption: where this is.
        xt: the noisy images as the models saw them, (N, H, W, C) uint8.
        x0: the images that the step aimed at, the same.
        probabilities: p(y | x_t) of every class, (N, K), of several classifiers side by side; None without any.
        sigma: σ, where the scheduler has levels of it.
    """

    step: int
    steps: int
    caption: str
    xt: np.ndarray
    x0: np.ndarray
    probabilities: np.ndarray | None
    sigma: float | None


class Stopped(Exception):
    """Nobody waits for the drawing."""


def film(pipe: Any, **arguments: Any) -> Iterator[Frame]:
    """Frames of a pipeline's call, of which the last is its images."""
    return stream(lambda report: _draw(pipe, arguments, report))


def _draw(pipe: Any, arguments: dict[str, Any], report: Callable[[Frame | None], None]) -> None:
    classifier = getattr(pipe, "classifier", None)

    def on_step(pipe: Any, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        xt, x0 = tensors["model_input"], tensors["pred_original_sample"]
        steps = len(pipe.scheduler.timesteps)
        if index not in frame_steps(steps, xt.numel()):
            report(None)
            return {}
        sigma = _sigma(pipe.scheduler, t)
        place = f"t = {float(t):.0f}" if sigma is None else f"σ = {sigma:.3g}"
        caption = f"step {index + 1} of {steps}, {place}"
        probabilities = _probabilities(classifier, xt, t)
        report(Frame(index + 1, steps, caption, _bytes(pipe, xt), _bytes(pipe, x0), probabilities, sigma))
        return {}

    output = pipe(
        **arguments,
        output_type="np",
        callback_on_step_end=on_step,
        callback_on_step_end_tensor_inputs=["model_input", "pred_original_sample"],
    )
    images, steps = to_bytes(output.images), len(pipe.scheduler.timesteps)
    x0 = torch.from_numpy(output.images).permute(0, 3, 1, 2).to(pipe.device)
    x0 = x0 if draws_from_zero(pipe.unet) else 2 * x0 - 1
    probabilities = _probabilities(classifier, x0, torch.tensor(0, device=pipe.device))
    report(Frame(steps + 1, steps, "the image", images, images, probabilities, None))


def frame_steps(steps: int, numel: int) -> set[int]:
    """The steps to be shown, evenly, the first and the last among them, fewer of larger images."""
    count = min(steps, max(FEWEST_FRAMES, min(MOST_FRAMES, FILM_VALUES // numel)))
    return {round(i * (steps - 1) / max(1, count - 1)) for i in range(count)}


@torch.no_grad()
def _probabilities(classifier: Any, xt: Tensor, t: Tensor) -> np.ndarray | None:
    if classifier is None:
        return None
    logits = classifier(xt, t).logits.float()
    probabilities = logits.exp() if members_of(classifier) else logits.softmax(-1)  # a set gives log-probabilities
    return probabilities.cpu().numpy()


def _bytes(pipe: Any, images: Tensor) -> np.ndarray:
    images = images if draws_from_zero(pipe.unet) else images / 2 + 0.5
    return to_bytes(images.permute(0, 2, 3, 1).float().cpu().numpy())


def _sigma(scheduler: Any, t: Tensor) -> float | None:
    return float(scheduler.sigmas[int(t)]) if isinstance(scheduler, AnnealedLangevinScheduler) else None


def stream(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """Runs a function in a thread and yields what it reports, None aside.

    Closing the generator makes the function's next report raise [`Stopped`]; an error of the function is raised here.
    """
    reports: queue.Queue = queue.Queue()
    stopped = threading.Event()
    end = object()

    def report(item: Any) -> None:
        if stopped.is_set():
            raise Stopped
        if item is not None:
            reports.put(item)

    def run() -> None:
        try:
            work(report)
            reports.put(end)
        except Stopped:
            pass
        except BaseException as error:
            reports.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (item := reports.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
