"""Whether the mean colour of a model's samples has left that of its data.

A model that predicts noise divides its errors by √ᾱ where the noise is large, and there the mean colour is decided. So
it is the first that goes wrong in small colour sets.
"""

import sys
from functools import cached_property

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.labelled import LabelledImages, spread_rows

CHANNELS = {1: ("grey",), 3: ("red", "green", "blue")}
MOST_IMAGES, BATCH_SIZE = 5000, 256  # of the data, spread over it
FAR = 5.0  # standard errors
LEAST = 1 / 255  # deviation, of images of one colour: half a step of bytes
ERRS_AT_NOISE = ("epsilon", "score")


def mean_colours(images: Tensor) -> Tensor:
    """The mean of each image's channels, (N, C, H, W) to (N, C), float64."""
    return images.double().mean(dim=(2, 3))


class ColourDrift:
    """How far the mean colour of samples is from that of the data.

    Args:
        data: the images a model is trained on.
        classes: classes that its samples show, in their shares, int64; None where they come as in the data.
        prediction_type: what the model predicts.
    """

    def __init__(self, data: LabelledImages, classes: Tensor | None, prediction_type: str) -> None:
        self.data, self.classes, self.prediction_type = data, classes, prediction_type
        self.is_far = False

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the data's mean colours, each (C,)."""
        rows = spread_rows(len(self.data.images), MOST_IMAGES)
        colours = torch.cat([mean_colours(self.data.images[part]) for part in rows.split(BATCH_SIZE)])
        weight = torch.full((len(rows), 1), 1 / len(rows), dtype=torch.float64)
        if self.classes is not None and self.data.labels is not None:
            labels = self.data.labels[rows]
            shown, there = (
                torch.bincount(kinds, minlength=len(self.data.label_names)) for kinds in (self.classes, labels)
            )
            weight = (shown / there)[labels, None].double()
            weight = weight / weight.sum()
        mean = (weight * colours).sum(dim=0)
        return mean, (weight * (colours - mean).square()).sum(dim=0).sqrt()

    def measure(self, images: Tensor) -> dict[str, float]:
        """For each channel, the mean of samples less that of the data, in standard errors of as many data images.

        Args:
            images: the samples, bytes (N, C, H, W).
        """
        mean, deviation = self.expected
        away = mean_colours(images / 127.5 - 1).mean(dim=0) - mean
        drift = away / (deviation.clamp(min=LEAST) / len(images) ** 0.5)
        names = CHANNELS.get(len(drift)) or [str(channel) for channel in range(len(drift))]
        return {f"drift_{name}": value for name, value in zip(names, drift.tolist(), strict=True)}

    def warn(self, drift: dict[str, float], count: int, *, again: bool) -> None:
        """Says so in a line when the colour has left the data's, and what to do.

        Args:
            drift: from [`measure`].
            count: of the samples.
            again: say it even if it was away before.
        """
        was_far, self.is_far = self.is_far, any(abs(value) > FAR for value in drift.values())
        if self.is_far and (again or not was_far):
            tqdm.write(describe(drift, count, self.prediction_type), file=sys.stderr)


def describe(drift: dict[str, float], count: int, prediction_type: str) -> str:
    """A sentence on a drift and its remedy."""
    found = [f"{name.removeprefix('drift_')} by {value:+.1f}" for name, value in drift.items()]
    remedy = (
        f"`--prediction_type v_prediction` or `sample` keeps it where {prediction_type!r} does not"
        if prediction_type in ERRS_AT_NOISE
        else "train longer, or with a lower `--learning_rate`"
    )
    return (
        f"The mean colour of the samples has left the data's, {', '.join(found)} standard errors of the mean of "
        f"{count} images; {remedy}."
    )
