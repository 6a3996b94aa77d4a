"""Guidance by several classifiers at once: log p = Σ_c w_c log p_c(y_c | x_t), each with labels and a scale of its own.

A set of classifiers gives the log-probabilities of all, side by side; a label of each is a term of one composition
([`~composition.composed_labels`]) among the columns of its classifier.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .components import class_names, config_of
from .composition import composed_labels
from .inputs import label_index_in, labels_of

Scales = float | Tensor | Mapping[str, float | Tensor] | None


def members_of(classifier: Any) -> dict[str, Any]:
    """The classifiers of a set by name; empty for any other classifier."""
    return dict(classifier.members.items()) if type(classifier).__name__ == "ClassifierSet" else {}


def main_classifier(classifier: Any) -> Any:
    """The one whose labels need no name: the first of a set, or the classifier itself."""
    return next(iter(members_of(classifier).values()), classifier)


def check_names(argument: str, given: Any, members: Mapping[str, Any]) -> None:
    """Refuses anything but a dictionary of known classifiers.

    Raises:
        ValueError: then.
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f"`{argument}` must be a dictionary by classifier, {sorted(members)}, for several of them, got {given!r}."
        )
    unknown = sorted(set(map(str, given)) - set(members))
    if unknown:
        raise ValueError(f"`{argument}` must name classifiers among {sorted(members)}, got {unknown}; check the names.")


def joint_labels(class_labels: Any, members: Mapping[str, Any], scales: Mapping[str, Tensor]) -> Tensor:
    """The labels of all classifiers as one composition, (B, J, ΣK + 1).

    Args:
        class_labels: labels of each image by classifier, as a pipeline of that one takes them; one left out does not
            guide. Without a dictionary, those of the first classifier.
        members: the classifiers.
        scales: w of each, [`joint_scales`].

    Raises:
        ValueError: for an unknown classifier or label, or unequal numbers of labels or scales.
    """
    if not isinstance(class_labels, Mapping):
        class_labels = {next(iter(members)): class_labels}
    check_names("class_labels", class_labels, members)
    counts = {name: config_of(member, "num_classes") for name, member in members.items()}
    unknown = sorted(name for name, count in counts.items() if count is None)
    if unknown:
        raise ValueError(
            f"`classifier` must tell its `num_classes` in its config where there are several, got {unknown}."
        )
    starts = dict(zip(counts, torch.tensor([0, *counts.values()]).cumsum(0).tolist()))
    parts = []
    for name, labels in class_labels.items():
        if isinstance(labels, Tensor) and labels.is_floating_point():
            raise ValueError(
                f"`class_labels` of {name!r} must be classes or compositions of them where there are several "
                f"classifiers, got probabilities of shape {tuple(labels.shape)}; use `Either`, with weights."
            )
        index_of = label_index_in(counts[name], class_names(members[name]))
        own = composed_labels(labels_of(labels), counts[name], index_of)
        joint = torch.zeros(*own.shape[:2], sum(counts.values()) + 1)
        joint[..., starts[name] : starts[name] + counts[name]] = len(members) * own[..., :-1]  # probabilities share 1
        if scales[name].ndim and len(scales[name]) != len(own):
            raise ValueError(
                f"`guidance_scale` of {name!r} must be one number, or one per image, {len(own)}, got "
                f"{len(scales[name])}."
            )
        joint[..., -1] = scales[name].view(-1, 1) * own[..., -1]
        parts.append(joint)
    if len({len(part) for part in parts}) > 1:
        sizes = {name: len(part) for name, part in zip(class_labels, parts)}
        raise ValueError(f"`class_labels` must be as many for each classifier, one per image, got {sizes}.")
    return torch.cat(parts, dim=1)


def joint_scales(guidance_scale: Scales, members: Mapping[str, Any]) -> dict[str, Tensor]:
    """w of each classifier, one for all images or (B,): given for all or by name, or its own by default.

    Raises:
        ValueError: for an unknown classifier, or a scale that is no number of at least 0, nor (B,) of them.
    """
    own = {name: config_of(member, "guidance_scale") for name, member in members.items()}
    chosen = {name: 1.0 if scale is None else scale for name, scale in own.items()}
    if isinstance(guidance_scale, Mapping):
        check_names("guidance_scale", guidance_scale, members)
        chosen |= guidance_scale
    elif guidance_scale is not None:
        chosen = dict.fromkeys(members, guidance_scale)
    return {name: _scale_tensor(name, scale) for name, scale in chosen.items()}


def _scale_tensor(name: str, scale: Any) -> Tensor:
    """A checked scale, () or (B,)."""
    numbers = isinstance(scale, int | float) and not isinstance(scale, bool)
    if numbers or (isinstance(scale, Tensor) and scale.ndim == 1):
        tensor = torch.as_tensor(scale, dtype=torch.float32, device="cpu")
        if tensor.isfinite().all() and (tensor >= 0).all():
            return tensor
    raise ValueError(
        f"`guidance_scale` of {name!r} must be a finite number of at least 0, or a tensor of one per image, got "
        f"{scale!r}."
    )
