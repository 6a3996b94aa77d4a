"""Sizes and steps of a guided pipeline's training, for the pictures, the machine's measured speed and a time budget."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..data.labelled import LabelledImages
from ..models.noisy_classifier import NoisyClassifier
from ..pipelines.optimization import fastest_dtype
from ..schedulers.scheduling_ddpm import DDPMScheduler
from .losses import classification_loss, ddpm_losses
from .settings import DDPMSettings, GuidedSettings
from .unet import build_unet

DIFFUSION, CLASSIFIER = 0.6, 0.2  # shares of the time; the rest is for reading, measuring and drawing
WIDTHS = (16, 32, 48, 64, 96, 128, 192)  # of a UNet's first level; those below have twice that
MOST_GROUPS, HEAD_DIM = 8, 16
SMALLEST_MAP = 8  # pixels, of the last level
IMAGES = 80_000  # that a network should see at least, the same ones again and again
FEW_IMAGES = 5_000  # below which they are augmented
AUGMENTED = 0.12  # probability, as for CIFAR-10 in Karras et al. (2022)
UNEVEN = 1.2  # largest class over smallest, above which they are balanced
HELD_OUT, MOST_HELD_OUT, FEWEST_TO_HOLD_OUT = 0.1, 200, 100  # a share, images held out, images in all
BATCH_SIZE = 64
TYPICAL_WIDTH = 32
LEARNING_RATE, OF_WIDTH = 1e-3, 32  # of a UNet of this width; it falls with the root of the width
MOST_CLASSIFIER_STEPS = 4_000
MEASURED_STEPS = 3
SIZES_BY_HOURS = {"cpu": {0.0: 32, 2.0: 64}, "cuda": {0.0: 64, 4.0: 128}}  # pixels, from so many hours on


@dataclass(frozen=True)
class Choice:
    """A setting, its value and why it has that."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return f"  --{self.name} {value}: {self.reason}"


def choose_resolution(settings: GuidedSettings, shorter_side: int, device: torch.device) -> Choice:
    """The size of the images.

    Args:
        settings: of the run.
        shorter_side: the median of the pictures'.
        device: of the training.
    """
    sizes = SIZES_BY_HOURS.get(device.type, SIZES_BY_HOURS["cuda"])
    most = max(size for hours, size in sizes.items() if settings.seconds >= 3600 * hours)
    multiple = SMALLEST_MAP if shorter_side >= 4 * SMALLEST_MAP else 4 if shorter_side >= 4 else 1
    size = max(1, min(most, shorter_side - shorter_side % multiple))
    reason = f"half of the pictures have {shorter_side} pixels or more on their shorter side"
    if size == most < shorter_side:
        where = "a CPU" if device.type == "cpu" else "one GPU"
        reason += f", and {where} learns no more than {most} pixels in {settings.time_budget}"
    return Choice("resolution", size, reason)


def choose(settings: GuidedSettings, data: LabelledImages, device: torch.device, processes: int) -> list[Choice]:
    """Every other setting that is not given, with its reason; takes some seconds to measure the machine.

    Args:
        settings: of the run.
        data: its images, with labels.
        device: of the training.
        processes: how many train.
    """
    choices = _about_the_data(settings, data)
    batch_size = settings.train_batch_size
    if batch_size is None:
        batch_size = max(1, min(BATCH_SIZE, len(data.images) // 2 // processes))
        choices.append(Choice("train_batch_size", batch_size, "a step of fewer images takes nearly as long"))
    images = data.images[torch.arange(batch_size) % len(data.images)].to(device)
    speed_of = cache(lambda widths, precision: _unet_speed(widths, images, precision))
    precision = settings.mixed_precision
    if precision is None:
        choices.append(_choose_precision(images, speed_of))
        precision = choices[-1].value
    seconds = DIFFUSION * settings.seconds
    widths = settings.block_out_channels
    if widths is None:
        widths = _choose_widths(images, lambda widths: speed_of(widths, precision) * processes * seconds)
        reason = f"of the networks that see {IMAGES:,} images in their time, the widest, or the narrowest of all"
        choices.append(Choice("block_out_channels", widths, reason))
    if settings.max_train_steps is None:
        speed = speed_of(tuple(widths), precision)
        reason = f"{DIFFUSION:.0%} of the time, at {speed:.0f} images a second"
        choices.append(Choice("max_train_steps", max(1, int(speed * seconds / batch_size)), reason))
    if settings.learning_rate is None:
        rate = float(f"{LEARNING_RATE * (OF_WIDTH / widths[0]) ** 0.5:.1g}")
        choices.append(Choice("learning_rate", rate, "wider networks take smaller ones"))
    if settings.classifier_steps is None:
        speed = _classifier_speed(images, len(data.label_names), precision)
        steps = int(speed * CLASSIFIER * settings.seconds / batch_size)
        reason = f"{CLASSIFIER:.0%} of the time, at {speed:.0f} images a second, and {MOST_CLASSIFIER_STEPS:,} at most"
        choices.append(Choice("classifier_steps", max(1, min(steps, MOST_CLASSIFIER_STEPS)), reason))
    return choices


def _about_the_data(settings: GuidedSettings, data: LabelledImages) -> list[Choice]:
    count, choices = len(data.images), []
    assert data.labels is not None
    sizes = data.labels.bincount(minlength=len(data.label_names))
    largest, smallest = int(sizes.max()), int(sizes[sizes > 0].min())
    if settings.hold_out is None and settings.validation_data is None and settings.dataset != "digits":
        share = min(HELD_OUT, float(f"{MOST_HELD_OUT / count:.2g}")) if count >= FEWEST_TO_HOLD_OUT else 0.0
        why = (
            f"to measure with, {MOST_HELD_OUT} images at most" if share else f"{count} images are too few to spare any"
        )
        choices.append(Choice("hold_out", share, why))
    if settings.balance_classes is None:
        reason = f"classes have {smallest:,} to {largest:,} images"
        choices.append(Choice("balance_classes", largest > UNEVEN * smallest, reason))
    if settings.augment_probability is None:
        chosen, how = (AUGMENTED, "few") if count < FEW_IMAGES else (0.0, "enough")
        choices.append(Choice("augment_probability", chosen, f"{count:,} images are {how}"))
    return choices


def _choose_precision(images: Tensor, speed_of: Callable[[tuple[int, ...], str], float]) -> Choice:
    if fastest_dtype(images.device) == torch.float32:
        return Choice("mixed_precision", "no", "the hardware has no bfloat16 arithmetic")
    widths = _levels(TYPICAL_WIDTH, images)
    single, half = (speed_of(widths, precision) for precision in ("no", "bf16"))
    return Choice("mixed_precision", "bf16" if half > single else "no", f"bf16 is {half / single:.1f} times as fast")


def _levels(width: int, images: Tensor) -> tuple[int, ...]:
    """The widths of a UNet's levels, as many as halve the images down to `SMALLEST_MAP` pixels."""
    size, levels = images.shape[-1], 1
    while size > SMALLEST_MAP and size % 2 == 0:
        size, levels = size // 2, levels + 1
    return (width, *[2 * width] * (levels - 1))


def _choose_widths(images: Tensor, seen_by: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The widest network that sees `IMAGES` images in its time, or else the narrowest."""
    chosen = _levels(WIDTHS[0], images)
    for width in WIDTHS[1:]:
        widths = _levels(width, images)
        if seen_by(widths) < IMAGES:
            break
        chosen = widths
    return chosen


def unet_settings(widths: Sequence[int]) -> dict[str, Any]:
    """What a UNet of these widths has besides: groups of at least two channels, heads that divide them."""
    groups = math.gcd(MOST_GROUPS, *(width // 2 for width in widths))
    return {
        "block_out_channels": tuple(widths),
        "norm_num_groups": groups,
        "attention_head_dim": math.gcd(HEAD_DIM, *widths),
        "attention": (-1,),
    }


def classifier_settings(size: int) -> dict[str, Any]:
    """The classifier's network for images of a size."""
    levels = 1 + sum(size % 2**level == 0 and size // 2**level >= SMALLEST_MAP - 1 for level in (1, 2))
    attends = (2 ** (levels - 1),) if levels > 1 else ()
    return {
        "model_channels": 32,
        "channel_mult": (1, 2, 3)[:levels],
        "num_res_blocks": 1,
        "attention_downsamples": attends,
        "num_head_channels": 32,
        "norm_num_groups": 8,
    }


# --- the machine's speed ---------------------------------------------------------------------------------------------


def _unet_speed(widths: Sequence[int], images: Tensor, precision: str | None) -> float:
    data = LabelledImages(images, None, [])
    unet = build_unet(DDPMSettings(**unet_settings(widths)), data).to(images.device)
    scheduler, noise = DDPMScheduler(), torch.randn_like(images)
    timestep = torch.arange(len(images), device=images.device)
    return _images_per_second(
        unet, lambda: ddpm_losses(unet, scheduler, images, timestep, noise).mean(), len(images), precision
    )


def _classifier_speed(images: Tensor, classes: int, precision: str | None) -> float:
    _, channels, size, _ = images.shape
    classifier = NoisyClassifier(
        in_channels=channels, sample_size=size, num_classes=classes, **classifier_settings(size)
    ).to(images.device)
    scheduler, noise = DDPMScheduler(), torch.randn_like(images)
    timestep = torch.arange(len(images), device=images.device)
    return _images_per_second(
        classifier,
        lambda: classification_loss(classifier, scheduler, images, timestep, noise, timestep % classes),
        len(images),
        precision,
    )


def _images_per_second(model: nn.Module, loss: Any, batch_size: int, precision: str | None) -> float:
    """Of training steps: the median of some, after one to warm up."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    times = []
    for _ in range(1 + MEASURED_STEPS):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        value.item()  # waits for the device
        times.append(time.perf_counter() - start)
    return batch_size / sorted(times[1:])[MEASURED_STEPS // 2]


def with_choices(settings: GuidedSettings, choices: Sequence[Choice]) -> GuidedSettings:
    """The settings with what was chosen."""
    return replace(settings, **{choice.name: choice.value for choice in choices})
