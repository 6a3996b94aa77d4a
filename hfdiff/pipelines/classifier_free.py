"""Guidance away from a worse prediction: classifier-free guidance and autoguidance.

    ε̂ = ε_θ(x_t, y) + Σ_j (s_j - 1) (ε_θ(x_t, y) - ε_j(x_t))

ε_j is that of the same UNet told no class (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022; their w is
s - 1), or of a weaker model told the same class (Karras et al., "Guiding a Diffusion Model with a Bad Version of
Itself", 2024). A scale of 1 is off.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .components import config_of

Number = float | int


class Reference(NamedTuple):
    """A prediction to guide away from.

    Args:
        unet: that makes it.
        drops_class: whether it is told no class, the embedding after the last.
        scales: s of each step.
    """

    unet: nn.Module
    drops_class: bool
    scales: Sequence[Number]


def extrapolate(output: Tensor, references: Sequence[tuple[Number, Tensor]]) -> Tensor:
    """The guided prediction m + Σ_j (s_j - 1) (m - m_j), for predictions of any one type, which are linear in ε.

    Args:
        output: m, (B, C, H, W).
        references: pairs of s_j and m_j.
    """
    return output + sum((scale - 1) * (output - reference) for scale, reference in references)


def make_references(
    unet: Any,
    num_classes: int | None,
    classifier_free_scale: Any,
    weak_unet: Any,
    autoguidance_scale: Any,
    active: Sequence[bool],
) -> list[Reference]:
    """What a call is guided away from.

    Args:
        unet: of the pipeline.
        num_classes: K.
        classifier_free_scale: s against no class.
        weak_unet: the weaker model.
        autoguidance_scale: s against it.
        active: of each step.

    Raises:
        ValueError: for a scale below 0, one without what it needs, or a weaker model of other images or classes.
    """
    for name, scale in (("classifier_free_scale", classifier_free_scale), ("autoguidance_scale", autoguidance_scale)):
        if isinstance(scale, bool) or not isinstance(scale, Number) or not 0 <= scale < math.inf:
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {scale!r}; 1 switches it off.")
    references = []
    if classifier_free_scale != 1:
        embeddings = config_of(unet, "num_class_embeds")
        if embeddings is None or num_classes is None or embeddings != num_classes + 1:
            raise ValueError(
                "`classifier_free_scale` needs a class-conditional UNet with one more embedding, of no class, than "
                f"classes, got {classifier_free_scale} with {embeddings or 'no'} embeddings; train one with "
                "`--class_dropout 0.1`, or leave the scale at 1."
            )
        references.append(Reference(unet, True, [classifier_free_scale if on else 1 for on in active]))
    if (autoguidance_scale != 1) != (weak_unet is not None):
        raise ValueError(
            f"`autoguidance_scale` and `weak_unet` need each other, got {autoguidance_scale} and "
            f"{'none' if weak_unet is None else type(weak_unet).__name__}; give both, or leave both out."
        )
    if weak_unet is not None:
        for name in ("sample_size", "in_channels", "num_class_embeds"):
            ours, theirs = config_of(unet, name), config_of(weak_unet, name)
            if ours != theirs:
                raise ValueError(
                    f"`weak_unet` must have the UNet's {name}, {ours}, got {theirs}; take an earlier checkpoint of it."
                )
        references.append(Reference(weak_unet, False, [autoguidance_scale if on else 1 for on in active]))
    return references
