"""What the parts of a guided pipeline say of themselves, and whether they belong together."""

from collections.abc import Mapping
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import has_noise_levels


def config_of(component: Any, name: str) -> Any:
    """An entry of a component's config, or None."""
    config = getattr(component, "config", {})
    return config.get(name) if hasattr(config, "get") else getattr(config, name, None)


def class_names(component: Any) -> dict[int, str]:
    """Names of the classes in a component's config, by their indices, which JSON makes strings; empty without any."""
    return {int(index): str(name) for index, name in (config_of(component, "id2label") or {}).items()}


def floats_of(module: nn.Module) -> Tensor:
    """A floating tensor of the module, for its device and dtype."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def dtype_of(component: Any) -> torch.dtype:
    """What a component computes in: it may say so, where its weights are stored in fewer bits, or is as its weights."""
    said = getattr(component, "dtype", None)
    return said if isinstance(said, torch.dtype) else floats_of(component).dtype


def latent_shape(unet: Any, batch_size: int) -> tuple[int, ...]:
    """(B, C, H, W) of so many images."""
    size = config_of(unet, "sample_size")
    return (batch_size, config_of(unet, "in_channels"), *((size, size) if isinstance(size, int) else size))


def is_of(component: Any, package: str) -> bool:
    """Whether a component's class, or one that it derives from, is of a package, which need not be installed."""
    return any(kind.__module__.partition(".")[0] == package for kind in type(component).__mro__)


def join_classifiers(classifier: Any) -> Any:
    """A dictionary of classifiers as one component; any other classifier as it is."""
    if not isinstance(classifier, Mapping):
        return classifier
    return import_module("hfdiff.models.classifier_set").ClassifierSet.join(classifier)


def check_components(unet: Any, classifier: Any, scheduler: Any, id2label: dict[int, str]) -> None:
    """Refuses a classifier made for other images, classes or noise than the UNet and the scheduler.

    Raises:
        ValueError: then.
    """
    embeddings = config_of(unet, "num_class_embeds")
    if embeddings is not None and len(id2label) > embeddings:
        raise ValueError(
            f"`unet` must have an embedding of each class, got {embeddings} for {len(id2label)}; take the one trained "
            "on the same classes."
        )
    if classifier is None:
        return
    if type(classifier).__name__ == "ClassifierSet":
        for name, member in classifier.members.items():
            if getattr(member, "reads_x0", False):
                raise ValueError(
                    f"`classifier` must know noisy images where there are several, got a {type(member).__name__} as "
                    f"{name!r}; let it guide by `guide=`."
                )
            check_components(unet, member, scheduler, {})
        return
    if is_of(classifier, "transformers"):
        raise ValueError(
            f"`classifier` must map noisy images and a timestep, (x_t, t), to logits, got {type(classifier).__name__}, "
            "which takes clean images alone; wrap it: hfdiff.CleanClassifier(model), or use an hfdiff.NoisyClassifier."
        )
    if unet is None or scheduler is None:
        return
    for name in ("sample_size", "in_channels"):
        ours, theirs = config_of(unet, name), config_of(classifier, name)
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"`classifier` must have the UNet's {name}, {ours}, got {theirs}; use a classifier trained on the same "
                "images."
            )
    channels, theirs = config_of(unet, "in_channels"), getattr(classifier, "num_channels", None)
    if None not in (channels, theirs) and channels not in (1, theirs):
        raise ValueError(
            f"`classifier` must take the UNet's {channels} channels, got a classifier of {theirs}; use one of colours."
        )
    classes = config_of(classifier, "num_classes")
    if None not in (classes, embeddings) and classes not in (embeddings, embeddings - 1):  # one may stand for no class
        raise ValueError(
            f"`classifier` must know the UNet's {embeddings} classes, got {classes}; use one trained on them."
        )
    schedule = config_of(classifier, "noise_schedule")
    if schedule is None or not hasattr(scheduler, "alphas_cumprod") or has_noise_levels(scheduler, schedule):
        return
    names = {name: config_of(scheduler, name) for name in schedule}
    raise ValueError(
        f"`classifier` must be trained on the scheduler's noise levels, {names}, got {schedule}; make the scheduler "
        "with `from_config(pipe.scheduler.config)`, or train a classifier for it."
    )
