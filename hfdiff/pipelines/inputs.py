"""Checks and conversions of the guided pipeline's arguments, made before any model runs.

Each raises a ValueError that names the argument, what was expected, what came and the remedy.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .composition import Composition, composed_labels

KINDS_OF_NOISE = {"sigma_schedule": "from_betas", "scale_input": False}  # and what they are where a config lacks them

Label = int | str | Composition
Labels = Label | Sequence[Label] | Tensor


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}; choose one of these.")


def check_integer(name: str, value: Any, least: int = 1, remedy: str = "") -> None:
    """Refuses a value that is not an integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        end = f"; {remedy}." if remedy else "."
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}{end}")


def check_num_inference_steps(steps: Any, num_train_timesteps: float) -> None:
    """Refuses a number of steps that is not an integer in [1, num_train_timesteps], of which the latter may be ∞."""
    if not isinstance(steps, Integral) or isinstance(steps, bool) or not 1 <= int(steps) <= num_train_timesteps:
        most = "" if math.isinf(num_train_timesteps) else f" to the {num_train_timesteps} timesteps of training"
        raise ValueError(
            f"`num_inference_steps` must be an integer from 1{most}, got {steps!r}; choose a number in that range."
        )


def most_steps(scheduler: Any) -> float:
    """The most model calls of a sampling: as many as there are timesteps, or any where each may be visited again."""
    revisits = scheduler.config.get("steps_per_level") is not None
    return math.inf if revisits else scheduler.config.num_train_timesteps


def has_noise_levels(scheduler: Any, schedule: dict[str, Any]) -> bool:
    """Whether a scheduler's noise levels, and what its model is given of them, are those of another's config entries.

    Args:
        scheduler: with ᾱ as its `alphas_cumprod`.
        schedule: entries of the config of a scheduler of its kind, or of another kind.
    """
    for name, usual in KINDS_OF_NOISE.items():
        if (schedule.get(name) or usual) != (scheduler.config.get(name) or usual):
            return False
    config = {**scheduler.config, **schedule, "_use_default_values": []}
    theirs, ours = (other.alphas_cumprod.float() for other in (type(scheduler).from_config(config), scheduler))
    return len(theirs) == len(ours) and torch.allclose(theirs, ours, atol=1e-4)


def check_guidance_interval(interval: Any) -> tuple[float, float]:
    """Refuses anything but 0 ≤ start ≤ end ≤ 1, fractions of the sampling's progress."""
    try:
        start, end = (float(bound) for bound in interval)
    except (TypeError, ValueError):
        start = end = math.nan
    if not 0 <= start <= end <= 1:
        raise ValueError(
            "`guidance_interval` must be two fractions (start, end) of the sampling with 0 <= start <= end <= 1, "
            f"got {interval!r}; (0.0, 1.0) guides every step."
        )
    return start, end


def check_guidance_scale(scale: Any, batch_size: int) -> float | Tensor:
    """A non-negative finite float, or a (batch_size,) tensor of them."""
    values = torch.as_tensor(scale) if isinstance(scale, Real | Tensor) else None
    if values is None or isinstance(scale, bool) or values.dtype == torch.bool or values.is_complex():
        raise ValueError(
            "`guidance_scale` must be a number, a tensor of one number per image, or a function of progress that "
            f"gives either, got {scale!r}."
        )
    if values.ndim and values.shape != (batch_size,):
        raise ValueError(
            f"`guidance_scale` must be one number or have shape ({batch_size},), one per image, "
            f"got shape {tuple(values.shape)}; give one scale per class label."
        )
    if not torch.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            f"`guidance_scale` must be finite and at least 0, got {values.tolist()}; 0 switches guidance off."
        )
    return values.float() if values.ndim else float(values)


def scale_at(progress: float, guidance_scale: Any, batch_size: int) -> float | Tensor:
    """The checked scale of a step; a float 0 where no image is guided."""
    scale = guidance_scale(progress) if callable(guidance_scale) else guidance_scale
    scale = check_guidance_scale(scale, batch_size)
    return 0.0 if isinstance(scale, Tensor) and not scale.any() else scale


def check_batch_size(batch_size: Any, labels: Tensor | None) -> int:
    """How many images: as many as labels, or `batch_size`, an integer of at least 1, where there are none."""
    check_integer("batch_size", batch_size)
    if labels is None:
        return int(batch_size)
    if batch_size not in (1, len(labels)):
        raise ValueError(
            f"`batch_size` must be left out where there are class labels, one for each image, got {batch_size} for "
            f"{len(labels)} labels."
        )
    return len(labels)


def check_generator(generator: Any, batch_size: int) -> None:
    """Refuses anything but None, a generator, or a list of one per image."""
    generators = generator if isinstance(generator, list | tuple) else [generator]
    if not all(g is None or isinstance(g, torch.Generator) for g in generators):
        raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
    if isinstance(generator, list | tuple) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` must have one generator per image, got {len(generator)} for {batch_size} images; give as "
            "many, or a single generator."
        )


def check_latents(latents: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuses latents of another shape or dtype than the pipeline works in."""
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        came = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"`latents` must be a tensor of shape {shape}: one per image, or particle, with the UNet's "
            f"channels and size; got {came}."
        )
    if latents.dtype not in dtypes:
        raise ValueError(
            f"`latents` must have dtype {dtypes[0]}, got {latents.dtype}; convert them with `latents.to({dtypes[0]})`."
        )
    if not latents.isfinite().all():
        raise ValueError("`latents` must be finite, got NaN or infinity; draw unit normal noise.")


def label_tensor(class_labels: Labels, num_classes: int | None, id2label: dict[int, str]) -> Tensor:
    """Class labels as a tensor on the CPU.

    Args:
        class_labels: one class index, name or composition of them, a sequence of them, a (B,) tensor of indices, or a
            (B, K) tensor of class probabilities.
        num_classes: K; None, where the classifier does not tell, leaves indices unchecked above.
        id2label: names of the classes.

    Returns:
        (B,) int64 indices, (B, K) float32 probabilities, or (B, J, K + 1) [`~composition.composed_labels`].
    """
    if hasattr(class_labels, "__array__") and not isinstance(class_labels, Tensor):
        class_labels = torch.as_tensor(class_labels)
    if isinstance(class_labels, Tensor) and class_labels.is_floating_point():
        return _probabilities(class_labels, num_classes)
    labels, index_of = labels_of(class_labels), label_index_in(num_classes, id2label)
    if not any(isinstance(label, Composition) for label in labels):
        return torch.tensor([index_of(label) for label in labels])
    if num_classes is None:
        raise ValueError(
            f"`class_labels` can be composed where the number of classes is known, got {labels}; give the classifier a "
            "config with `num_classes`."
        )
    return composed_labels(labels, num_classes, index_of)


def labels_of(class_labels: Any) -> list[Any]:
    """Labels as a list, at least one; a tensor's are indices."""
    if isinstance(class_labels, Tensor):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
        class_labels = [class_labels]
    if not class_labels:
        raise ValueError("`class_labels` must name at least one class, got none; give one label per image.")
    return list(class_labels)


def label_index_in(num_classes: int | None, id2label: dict[int, str]) -> Callable[[Any], int]:
    """What gives the index of a label, an index or a name, and refuses others."""

    def index_of(label: Any) -> int:
        index = _label_index(label, id2label)
        if index < 0 or (num_classes is not None and index >= num_classes):
            raise ValueError(
                f"`class_labels` must be between 0 and {'K' if num_classes is None else num_classes} - 1, "
                f"the classifier's classes, got {index}; see `pipe.classifier.config.id2label`."
            )
        return index

    return index_of


def _label_index(label: Any, id2label: dict[int, str]) -> int:
    if isinstance(label, Integral) and not isinstance(label, bool):
        return int(label)
    if isinstance(label, str):
        for index, name in id2label.items():
            if name == label:
                return index
        raise ValueError(
            f"`class_labels` must be class indices or names among {sorted(id2label.values())}, got {label!r}; "
            "names come from the classifier's `id2label`."
        )
    raise ValueError(
        "`class_labels` must be an integer, a name, a composition, a sequence of them, a (B,) integer tensor or a "
        f"(B, K) tensor of class probabilities, got {label!r} of type {type(label).__name__}."
    )


def _probabilities(probs: Tensor, num_classes: int | None) -> Tensor:
    classes = "K" if num_classes is None else num_classes
    if probs.ndim != 2 or not len(probs) or (num_classes is not None and probs.shape[1] != num_classes):
        raise ValueError(
            f"`class_labels` of floating dtype must be class probabilities of shape (B, {classes}), "
            f"got shape {tuple(probs.shape)}; for class indices use an integer tensor."
        )
    probs = probs.detach().cpu().float()
    sums = probs.sum(dim=-1)
    if not (probs >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ValueError(
            f"`class_labels` as probabilities must be at least 0 and sum to 1 in each row, got sums {sums.tolist()}; "
            "divide each row by its sum."
        )
    return probs
