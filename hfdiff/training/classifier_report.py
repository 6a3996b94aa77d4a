"""What is measured of a noisy classifier while it trains and at the end, alone and in its guided pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import LabelledImages
from ..data.sources import reading_model
from ..evaluation.accuracy import predicted_classes
from ..evaluation.guidance_information import (
    GuidanceInformation,
    guidance_information,
    plot_guidance_information,
)
from ..evaluation.networks import load_features
from ..evaluation.noise_levels import (
    NoiseBucket,
    average_noise_levels,
    evaluate_noise_levels,
    format_noise_levels,
    plot_noise_levels,
    save_noise_levels,
)
from ..models.noisy_classifier import NoisyClassifier
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from .batches import derive_seed, make_generator
from .card import Measurement
from .copying import COPIED, COPIES, HELD_OUT_SHARE, SHARE, CopyWatch
from .diffusion_model import Levels
from .samples import draw_images, save_grid

MEASURES = {
    "accuracy": "accuracy on noisy images",
    "cross_entropy": "cross entropy on noisy images (nats)",
    "calibration_error": "expected calibration error on noisy images (15 bins)",
}
CLASSES_DRAWN = 16  # at most, the first ones
INFORMATION_IMAGES, INFORMATION_LEVELS = 500, 30  # that the nats of a gradient are measured with


def judge_noise_levels(
    classifier: NoisyClassifier, scheduler: Levels, validation: LabelledImages, seed: int
) -> list[NoiseBucket]:
    """The classifier on labelled test images, with the same noise whenever it is asked."""
    assert validation.labels is not None
    generator = make_generator(seed, "validation", 0)
    return evaluate_noise_levels(classifier, scheduler, validation.images, validation.labels, generator=generator)


def judge_gradient(
    unet: Any, classifier: NoisyClassifier, scheduler: Levels, validation: LabelledImages, seed: int
) -> GuidanceInformation | None:
    """The nats of the classifier's gradient, with the same noise whenever it is asked; None where they are not defined.

    That is so for class-conditional UNets and for inputs whose variance is not 1.
    """
    if unet is None or unet.config.get("num_class_embeds") is not None or not getattr(scheduler, "scales_input", True):
        return None
    some = validation.spread(INFORMATION_IMAGES)
    assert some.labels is not None
    generator = make_generator(seed, "information", 0)
    return guidance_information(
        unet.to(classifier.device), classifier, scheduler, some.images, some.labels, generator,
        num_levels=INFORMATION_LEVELS,
    )  # fmt: skip


def make_monitor(
    unet: Any, classifier: NoisyClassifier, scheduler: Levels, validation: LabelledImages, seed: int
) -> Callable[[int], dict[str, float]]:
    """What a training looks at on its way: averages over all noise levels, each bucket's accuracy, the nats."""

    def monitor(step: int) -> dict[str, float]:
        rows = judge_noise_levels(classifier, scheduler, validation, seed)
        by_bucket = {f"accuracy_{row.first_timestep}_{row.last_timestep}": row.accuracy for row in rows}
        information = judge_gradient(unet, classifier, scheduler, validation, seed)
        nats = {} if information is None else {"nats_carried": information.carried, "nats_known": information.known}
        return average_noise_levels(rows) | by_bucket | nats

    return monitor


def report_gradient(
    unet: Any, classifier: NoisyClassifier, scheduler: Levels, validation: LabelledImages, seed: int, folder: Path
) -> list[Measurement]:
    """Prints the nats that the gradient carries and the probabilities know; draws them as `guidance_information.png`.

    Returns:
        Both, where they are defined.
    """
    information = judge_gradient(unet, classifier, scheduler, validation, seed)
    if information is None:
        return []
    print(f"On the class of an unseen image {information}.")
    plot_guidance_information(information, folder / "guidance_information.png")
    of = f"of {information.entropy:.2f}, {min(len(validation.images), INFORMATION_IMAGES)} test images"
    return [
        Measurement("nats that the classifier's gradient carries", information.carried, of),
        Measurement("nats that its probabilities know", information.known, of),
    ]


def report_noise_levels(
    classifier: NoisyClassifier, scheduler: Levels, validation: LabelledImages, seed: int, folder: Path
) -> list[Measurement]:
    """Prints the classifier's table by noise level and writes it as `noise_levels.json`, `.csv` and, a plot, `.png`.

    Returns:
        The averages over noise levels.
    """
    rows = judge_noise_levels(classifier, scheduler, validation, seed)
    print(format_noise_levels(rows))
    save_noise_levels(rows, folder)
    plot_noise_levels(rows, folder / "noise_levels.png")
    of = f"{len(validation.images):,} test images, each at one random timestep in each of {len(rows)} equal parts"
    return [Measurement(MEASURES[name], value, of) for name, value in average_noise_levels(rows).items()]


def report_samples(
    pipe: ClassifierGuidedPipeline,
    folder: Path,
    data: LabelledImages,
    held_out: LabelledImages | None,
    *,
    per_class: int,
    steps: int,
    judge: str | None,
    seed: int,
) -> list[Measurement]:
    """Draws images of each class, one row each, as `samples.png`; counts copies and asks another classifier of them.

    Args:
        pipe: what draws, at its default guidance scale.
        folder: where the picture goes.
        data: the images that were trained on.
        held_out: images that were not, if any.
        per_class: images of each class.
        steps: model calls per image; the trained chain's length where that is less.
        judge: the folder of a classifier of clean images; None asks none.
        seed: of the images.

    Returns:
        The share of copies, and the accuracy of that classifier, where there is one.
    """
    labels = [label for label in list(pipe.classifier.id2label)[:CLASSES_DRAWN] for _ in range(per_class)]
    images = draw_images(pipe, len(labels), steps, derive_seed(seed, "samples", 0), class_labels=tuple(labels))
    save_grid(images, folder / "samples.png", per_class)
    numbers = report_copies(images, data, held_out)
    if judge is None:
        return numbers
    load_judge(judge, pipe.classifier)
    seen = predicted_classes(load_features(f"classifier:{judge}"), images.permute(0, 2, 3, 1).numpy())
    accuracy = float(np.mean(np.equal(seen, labels)))
    of = f"{len(labels)} guided images, {steps} steps at scale {pipe.default_guidance_scale:g}, by {judge}"
    print(f"Accuracy {accuracy:.3f} of {of}.")
    return [*numbers, Measurement("share of guided images that show their class", accuracy, of)]


def report_copies(images: Tensor, data: LabelledImages, held_out: LabelledImages | None) -> list[Measurement]:
    """The share of samples that copy training images, and of held-out ones that pass for copies, where there are any.

    Args:
        images: the samples, bytes (N, C, H, W).
        data: the images that were trained on.
        held_out: images that were not.
    """
    of = {SHARE: f"{len(images)} guided images"}
    if held_out is not None:
        of[HELD_OUT_SHARE] = f"{len(held_out.images)} test images"
    shares = CopyWatch(data, held_out).measure(images)
    return [Measurement(COPIES[name], share, f"{of[name]}; {COPIED}") for name, share in shares.items()]


def load_judge(folder: str, classifier: NoisyClassifier) -> NoisyClassifier:
    """A classifier of clean images, to judge what another one guided.

    Raises:
        ValueError: when it is not there, or for other images or classes.
    """
    with reading_model("judge", folder):
        judge = NoisyClassifier.from_pretrained(folder, dtype=torch.float32)
    for name in ("sample_size", "in_channels", "num_classes"):
        if judge.config[name] != classifier.config[name]:
            raise ValueError(
                f"`judge` must have the classifier's {name}, {classifier.config[name]}, got {judge.config[name]}; use "
                "one trained on the same images."
            )
    return judge
