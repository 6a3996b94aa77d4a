"""Several labels for one image: products and mixtures of classes, as one log-probability.

    log p = Σ_j w_j log Σ_k v_jk p(k | x_t)

[`Both`] multiplies, [`Either`] mixes, [`Not`] is the rest of the classes, Σ_{k≠a} p(k | x_t) = 1 - p(a | x_t). Weights
are positive: dividing by a probability (Liu et al., "Compositional Visual Generation with Composable Diffusion Models",
ECCV 2022, section 4) need not leave a density, while `Not` always does.

At noise levels above 0 the noisy distribution of a product is not the product of the noisy ones (Du et al., "Reduce,
Reuse, Recycle", ICML 2023). `Either` and `Not` are events whose probability a classifier knows at each level, so plain
guidance towards them is exact; towards `Both` it needs `corrector_steps`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Composition:
    """Labels in one: class names, indices, or compositions.

    Args:
        labels: of one image; at least one.
        weights: a positive number for each, 1 by default.

    Raises:
        ValueError: for none, or for weights that do not fit.
    """

    def __init__(self, *labels: Any, weights: Sequence[float] | None = None) -> None:
        name = type(self).__name__
        if not labels:
            raise ValueError(f"`{name}` must have at least one label, got none.")
        numbers = [1.0] * len(labels) if weights is None else _numbers(weights)
        if len(numbers) != len(labels) or not all(0 < number < math.inf for number in numbers):
            raise ValueError(
                f"`weights` of `{name}` must be a positive number for each of its {len(labels)} labels, got {weights}; "
                "what an image should not be is asked for by `Not`."
            )
        self.labels, self.weights = labels, numbers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.labels))})"


class Both(Composition):
    """All labels at once: Π_j p(j | x)^{w_j}."""


class Either(Composition):
    """One of the labels: Σ_j w_j p(j | x)."""


class Not(Composition):
    """None of the labels: 1 - Σ_j p(j | x)."""

    def __init__(self, *labels: Any) -> None:
        super().__init__(*labels)


class Term(NamedTuple):
    """w log Σ_k v_k p(k | x): the weight w and the members v, (K,)."""

    weight: float
    members: Tensor


def composed_labels(labels: Sequence[Any], num_classes: int, index_of: Callable[[Any], int]) -> Tensor:
    """Labels as the members and weights of their terms, (B, J, K + 1): v in front, w in the last column.

    Args:
        labels: one per image, class labels or compositions.
        num_classes: K.
        index_of: the class index of a label, which it checks.
    """
    rows = [_terms(label, num_classes, index_of) for label in labels]
    longest = max(len(row) for row in rows)
    composed = torch.ones(len(rows), longest, num_classes + 1)
    composed[..., -1] = 0  # terms of no weight fill the shorter rows
    for row, terms in zip(composed, rows):
        for column, term in zip(row, terms):
            column[:-1], column[-1] = term.members, term.weight
    return composed


def composed_log_likelihood(log_probs: Tensor, composed: Tensor) -> Tensor:
    """Σ_j w_j log Σ_k v_jk p(k | x) of log p(k | x), (B, K), and [`composed_labels`]; (B,)."""
    members, weights = composed.to(log_probs).split([composed.shape[-1] - 1, 1], dim=-1)
    return (weights[..., 0] * (members.log() + log_probs[:, None]).logsumexp(dim=-1)).sum(dim=-1)


def _numbers(weights: Any) -> list[float]:
    """Weights as floats; none where they are not numbers in a sequence."""
    try:
        return [float(weight) for weight in weights if not isinstance(weight, str)]
    except (TypeError, ValueError):
        return []


def _terms(label: Any, num_classes: int, index_of: Callable[[Any], int]) -> list[Term]:
    if isinstance(label, Both):
        return [
            Term(weight * term.weight, term.members)
            for part, weight in zip(label.labels, label.weights)
            for term in _terms(part, num_classes, index_of)
        ]
    return [Term(1.0, _members(label, num_classes, index_of))]


def _members(label: Any, num_classes: int, index_of: Callable[[Any], int]) -> Tensor:
    """v of a label without products."""
    if isinstance(label, Both):
        raise ValueError(
            f"`class_labels` can have no `Both` inside `Either` or `Not`, got {label!r}; turn them around."
        )
    if not isinstance(label, Composition):
        return torch.nn.functional.one_hot(torch.tensor(index_of(label)), num_classes).float()
    parts = torch.stack([_members(part, num_classes, index_of) for part in label.labels])
    if isinstance(label, Either):
        return torch.tensor(label.weights) @ parts
    rest = 1 - parts.amax(dim=0).clamp(max=1)
    if not rest.any():
        raise ValueError(f"`class_labels` must leave at least one class, got {label!r}, which leaves none.")
    return rest
