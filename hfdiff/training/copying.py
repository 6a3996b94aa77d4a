"""Copies of training images among a model's samples, and the weights from before they set in.

Good samples come at a time that does not depend on the dataset's size, copies at one that grows with it (Bonnaire et
al., "Why Diffusion Models Don't Memorize: The Role of Implicit Dynamical Regularization in Training", 2025). So of a
small set, weights on the way are better than the last ones.
"""

import json
import sys
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.files import PARTIAL, replace, write_synced
from ..data.labelled import LabelledImages
from ..evaluation.copies import Copies, measure_copies
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
    f"the nearest training picture, or its mirror image, is half as far in pixels as the next {COPY_NEIGHBOURS} or less"
)
WEIGHTS = "before-copies.safetensors"


def find_copies(images: Tensor, data: LabelledImages, held_out: LabelledImages | None) -> Copies | None:
    """Copies of a dataset's images, or of their mirror images; None where it has too few to tell.

    Args:
        images: bytes, (N, C, H, W).
        data: the dataset.
        held_out: images that nothing was trained on, if any.
    """
    if len(data.images) < COPY_NEIGHBOURS:
        return None
    known = to_bytes(data.spread(TRAINING_IMAGES).images[:])
    unseen = None if held_out is None else to_bytes(held_out.images[:])
    return measure_copies(images, torch.cat([known, known.flip(-1)]), unseen)


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def watch_copies(
    model: nn.Module, images: Tensor, data: LabelledImages, held_out: LabelledImages | None, folder: Path, step: int
) -> dict[str, float]:
    """The share of copies among samples, and among held-out images; with these, keeps the weights while it is small.

    Args:
        model: with the weights that would be published after this step.
        images: its samples.
        data: what it is trained on.
        held_out: what it is not.
        folder: of the run.
        step: training steps done.
    """
    found = find_copies(images, data, held_out)
    if found is None:
        return {}
    if found.held_out_share is None:
        return {SHARE: found.share}
    numbers = {SHARE: found.share, HELD_OUT_SHARE: found.held_out_share}
    if not are_many(numbers):
        state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        partial = folder / f"{WEIGHTS}{PARTIAL}"
        write_synced(partial, safetensors.torch.save(state, {"step": str(step)}))
        replace(partial, folder / WEIGHTS)
    return numbers


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
