"""Copies of training images among a model's samples, and the weights from before they set in.

Good samples come at a time that does not depend on the dataset's size, copies at one that grows with it (Bonnaire et
al., "Why Diffusion Models Don't Memorize: The Role of Implicit Dynamical Regularization in Training", 2025). So of a
small set, weights on the way are better than the last ones.
"""

import json
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.files import place_file
from ..data.labelled import LabelledImages
from ..evaluation.copies import measure_copies
from ..evaluation.settings import COPY_NEIGHBOURS
from .log import VALIDATION

TRAINING_IMAGES = 10_000  # at most, spread over the dataset
ALLOWED = 0.05  # by which the share of copies may be above that of held-out images
SHARE, HELD_OUT_SHARE = "copies", "copies_held_out"
COPIES = {
    SHARE: "share of samples that copy a training image",
    HELD_OUT_SHARE: "share of unseen images that pass for copies",
}
COPIED = (
    f"copies are at most half as far in pixels from the nearest training picture, or its mirror image, as from the "
    f"{COPY_NEIGHBOURS} nearest on average"
)
WEIGHTS = "before-copies.safetensors"


class CopyWatch:
    """How many samples are copies of a dataset's images, or of their mirror images, beside how many unseen images are.

    Both at the same threshold, 1/2: a share above that of unseen images is what training has learnt by heart.

    Args:
        data: what a model is trained on.
        held_out: what it is not, if any.
    """

    def __init__(self, data: LabelledImages, held_out: LabelledImages | None) -> None:
        self.data, self.held_out = data, held_out

    def measure(self, images: Tensor) -> dict[str, float]:
        """The shares; empty where the dataset has too few images to tell.

        Args:
            images: the samples, bytes (N, C, H, W).
        """
        if len(self.data.images) < COPY_NEIGHBOURS:
            return {}
        numbers = {SHARE: measure_copies(images, self._known).share}
        return numbers if self.held_out is None else numbers | {HELD_OUT_SHARE: self._held_out_share}

    @cached_property
    def _known(self) -> Tensor:
        known = as_bytes(self.data.spread(TRAINING_IMAGES).images[:])
        return torch.cat([known, known.flip(-1)])

    @cached_property
    def _held_out_share(self) -> float:
        assert self.held_out is not None
        return measure_copies(as_bytes(self.held_out.images[:]), self._known).share


def as_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def keep_weights(model: nn.Module, folder: Path, step: int, numbers: dict[str, float]) -> None:
    """Keeps the weights after a step while copies have not set in, where that is known.

    Args:
        model: with the weights that would be published.
        folder: of the run.
        step: training steps done.
        numbers: from [`CopyWatch.measure`].
    """
    if HELD_OUT_SHARE in numbers and not are_many(numbers):
        state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        place_file(folder / WEIGHTS, safetensors.torch.save(state, {"step": str(step)}))


def are_many(numbers: dict[str, float]) -> bool:
    """Whether copies have set in, by a line of the validation."""
    return numbers.get(SHARE, 0.0) - numbers.get(HELD_OUT_SHARE, 1.0) > ALLOWED


def take_weights_before_copies(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Gives a trained model the weights from before copies set in, where they have and it was seen in time.

    Returns:
        What the validation measured of the weights that it has now.
    """
    lines = [json.loads(line) for line in (folder / VALIDATION).read_text().splitlines()]
    if not are_many(lines[-1]):
        return lines[-1]
    share, chance = (f"{lines[-1][name]:.0%}" for name in (SHARE, HELD_OUT_SHARE))
    text = f"After step {lines[-1]['step']}, {share} of the samples copy training images ({chance} of unseen ones do)"
    if not (folder / WEIGHTS).is_file():
        _say(f"{text}, and no validation was before that: give `--validation_steps`, fewer steps, or more images.")
        return lines[-1]
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        step = int(file.metadata()["step"])
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no iterator)
    _say(f"{text}; the weights of step {step}, from before, are kept.")
    return next(line for line in lines if line["step"] == step)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
