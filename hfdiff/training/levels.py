"""The noise levels of a score network, chosen from the images it trains on (Song & Ermon 2020, techniques 1 and 2)."""

from typing import Literal, NamedTuple

import torch

from ..data.labelled import LabelledImages
from ..schedulers.noise import ncsnv2_num_levels
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from .config import TrainingSettings

MOST_IMAGES = 10_000  # whose distances are compared
BLOCK = 1000  # of them at once

Auto = Literal["auto"]


class Levels(NamedTuple):
    """The largest of a geometric series of noise levels, how many there are, and why."""

    sigma_max: float
    num_levels: int
    reasons: list[str]


def largest_distance(images: torch.Tensor) -> float:
    """The largest Euclidean distance between two images, (N, C, H, W)."""
    flat = images.flatten(1)
    return max(torch.cdist(block, flat).max().item() for block in flat.split(BLOCK))


def choose_levels(data: LabelledImages, sigma_min: float, sigma_max: float | Auto, num_levels: int | Auto) -> Levels:
    """The levels as given, or where "auto" is given, by the paper's rules.

    Args:
        data: the dataset, of which 10,000 images, spread evenly, are compared.
        sigma_min: the smallest level.
        sigma_max: the largest, or "auto": the largest distance between two images, so that the first level's dynamics
            reach every one of them (technique 1).
        num_levels: how many, or "auto": [`~hfdiff.schedulers.noise.ncsnv2_num_levels`] (technique 2).

    Raises:
        ValueError: for levels out of their range, or images that are all alike.
    """
    images, reasons = data.spread(MOST_IMAGES).images, ["as given", "as given"]
    if sigma_max == "auto":
        sigma_max = largest_distance(images)
        reasons[0] = f"the largest distance between two of {len(images):,} images (technique 1)"
        if sigma_max <= sigma_min:
            raise ValueError(
                f"`sigma_max` cannot be the largest distance between two images, {sigma_max:.4g}, since `sigma_min` is "
                f"{sigma_min}; give a larger `sigma_max`."
            )
    if num_levels == "auto":
        num_levels = ncsnv2_num_levels(sigma_min, sigma_max, images[0].numel())
        ratio = (sigma_max / sigma_min) ** (1 / (num_levels - 1))
        reasons[1] = f"each level within reach of the next, {ratio:.4f} times smaller (technique 2)"
    texts = [f"sigma_max = {sigma_max:.4g}: {reasons[0]}", f"num_levels = {num_levels}: {reasons[1]}"]
    return Levels(sigma_max, num_levels, texts)


def sampling_reasons(scheduler: AnnealedLangevinScheduler, settings: TrainingSettings) -> list[str]:
    """What follows from the levels for sampling and for the weights that are kept (techniques 4 and 5)."""
    ratio = float(scheduler.step_sizes[0] / scheduler.sigmas[0] ** 2)
    ema = f"ema_decay = {settings.ema_decay}: samples of the averaged weights vary less in colour (technique 5)"
    return [
        f"step_size = {ratio:.4g} sigma_min²: solved for {scheduler.config.steps_per_level} steps per level "
        "(technique 4)",
        ema if settings.use_ema else "ema_decay: off, as given",
    ]
