"""Counterfactuals: the least change of a picture for which a classifier takes it for another class.

The picture is noised deterministically by DDIM run backwards (Song et al. 2021, section 4.3), then denoised again under
guidance to the other class, as little of the way and as weakly as the classifier accepts. A pull towards the picture
keeps what need not change (the distance terms of DiME, Jeanneret et al. 2022, and of Augustin et al. 2022). What the
way back, unguided, would miss of the way there is added to each step (Ju et al. 2024), so the picture itself comes back
to rounding, and every change is the guidance's.

Levels are numbered from the picture, 0, to noise; x at level i has ᾱ_i, and ᾱ_0 = 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from .components import config_of, dtype_of
from .gaussian import clip_x0_, convert, from_x0, to_x0
from .guidance import logits_of
from .guided_sampling import GuidedSampling
from .steps import SCORE_PREDICTIONS

STRENGTHS = (0.5, 0.65, 0.8, 0.9, 1.0)
MULTIPLES = (1, 2, 4, 8)  # of the pipeline's guidance scale


@dataclass
class CounterfactualOutput(ImagePipelineOutput):
    """Output of a search for counterfactuals; each tensor has one number per image, (B,).

    Args:
        images: as `output_type` says.
        l2: ‖change‖₂ of the pixels, which are in [0, 1].
        l1: ‖change‖₁ of the pixels.
        original_labels: the classes that the classifier took the pictures for.
        probabilities: of the class asked for, by the classifier; under `confidence` where the search failed.
        strengths: the share of the way to noise that was gone; 0 where the picture was of the class already.
        scales: w of the guidance back.
        intermediates: where they were asked for, the film: what each step aimed at, from the picture to the images.
    """

    l2: Tensor
    l1: Tensor
    original_labels: Tensor
    probabilities: Tensor
    strengths: Tensor
    scales: Tensor
    intermediates: list[Any] | None = None


class Inversion:
    """The deterministic noise of images at each level, and the way back to them.

    Args:
        image: in the model's range, (B, C, H, W).
        scheduler: has ᾱ as `alphas_cumprod`, and says the prediction type and how x_0 is clipped.
        steps: levels between image and noise.
        proximity: λ in [0, 1); each step's x_0 is pulled towards the image by the fraction λ (1-ᾱ).
    """

    def __init__(self, image: Tensor, scheduler: Any, steps: int, proximity: float) -> None:
        total = len(scheduler.alphas_cumprod)
        self.timesteps = torch.tensor([i * total // steps for i in range(steps)], device=image.device)
        self.levels = [1.0, *scheduler.alphas_cumprod[self.timesteps.cpu()].tolist()]
        self.image, self.config, self.proximity = image, scheduler.config, proximity

    def invert(self, sampling: GuidedSampling) -> None:
        """Noises the images, unguided and not clipped, which could not be undone; notes what the way back misses."""
        self.states, kind = [self.image], self.config["prediction_type"]
        for i, (alpha_bar, above) in enumerate(pairwise(self.levels)):
            xt = self.states[-1]
            output = self._output(sampling.evaluate(xt, self.timesteps[i], i).output)
            eps = convert(output, xt, above, kind, "epsilon")
            self.states.append(_noised(to_x0(eps, xt, alpha_bar, "epsilon"), eps, above))
        pairs = enumerate(pairwise(self.states))
        self.missed = [state - self._step(sampling, above, i, self.image)[0] for i, (state, above) in pairs]

    def draw(self, sampling: GuidedSampling, level: int, rows: Tensor) -> list[Tensor]:
        """What each step back from a level aims at, x_0, and at the end the images, clipped to the model's range.

        Args:
            sampling: with the guidance of these images.
            level: to begin at.
            rows: which of the images.
        """
        xt, film = self.states[level][rows], []
        for i in reversed(range(level)):
            xt, x0 = self._step(sampling, xt, i, self.image[rows])
            xt = xt + self.missed[i][rows]
            film.append(x0)
        film[-1] = xt.clamp(-1, 1)
        return film

    def _step(self, sampling: GuidedSampling, xt: Tensor, i: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """From level i + 1 to i by DDIM (equation 12 without noise), and the x_0 that it aims at."""
        alpha_bar, kind = self.levels[i + 1], self.config["prediction_type"]
        evaluation = sampling.evaluate(xt, self.timesteps[i], i)
        output, gradient = self._output(evaluation.output), evaluation.gradient
        if gradient is None:
            x0 = clip_x0_(to_x0(output, xt, alpha_bar, kind), self.config)
        else:
            x0 = to_x0(sampling.shift_score(output, xt, alpha_bar, gradient), xt, alpha_bar, kind)
        x0 = x0.lerp(image, self.proximity * (1 - alpha_bar))  # less and less, or the picture shows through
        return _noised(x0, from_x0(x0, xt, alpha_bar, "epsilon"), self.levels[i]), x0

    def _output(self, output: Tensor) -> Tensor:
        """Without the channels of a learned variance."""
        return output[:, : self.image.shape[1]]


def _noised(x0: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """√ᾱ x_0 + √(1-ᾱ) ε."""
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps


class Nearest:
    """The best counterfactual of each image so far: accepted and nearest, or, while none is, the most probable."""

    def __init__(self, image: Tensor, probabilities: Tensor, confidence: float, levels: int, keep_film: bool) -> None:
        self.original, self.confidence = image, confidence
        self.images, self.probabilities = image.clone(), probabilities.clone()
        self.distances = torch.where(probabilities >= confidence, 0.0, torch.inf)
        self.strengths, self.scales = torch.zeros_like(probabilities), torch.zeros_like(probabilities)
        self.film = image.repeat(levels + 1, *[1] * image.ndim) if keep_film else None

    def offer(self, film: list[Tensor], probabilities: Tensor, rows: Tensor, strength: float, scale: float) -> Tensor:
        """Takes up the candidates of some images where they are better; returns the rows that are not accepted."""
        accepted = probabilities >= self.confidence
        distances = torch.where(accepted, (film[-1] - self.original[rows]).flatten(1).norm(dim=1), torch.inf)
        likelier = ~accepted & self.distances[rows].isinf() & (probabilities > self.probabilities[rows])
        better = (distances < self.distances[rows]) | likelier
        chosen = rows[better]
        self.images[chosen], self.distances[chosen] = film[-1][better], distances[better].to(self.distances)
        self.probabilities[chosen], self.strengths[chosen], self.scales[chosen] = probabilities[better], strength, scale
        if self.film is not None:
            self.film[: -len(film), chosen] = self.original[chosen]
            self.film[-len(film) :, chosen] = torch.stack(film)[:, better]
        return rows[~accepted]

    def change(self) -> Tensor:
        """Of the pixels in [0, 1], (B, C·H·W)."""
        return ((self.images - self.original) / 2).flatten(1)


def search(
    inversion: Inversion,
    make_sampling: Callable[[Tensor, float], GuidedSampling],
    classifier: Any,
    labels: Tensor,
    strengths: Sequence[float],
    scales: Sequence[float],
    confidence: float,
    keep_film: bool,
) -> tuple[Nearest, Tensor]:
    """For each scale the least strength that the classifier accepts, and of these the nearest image.

    Args:
        inversion: of the images, not yet inverted.
        make_sampling: the networks for some labels and a scale.
        classifier: which is to accept.
        labels: asked for, (B,).
        strengths: to try.
        scales: to try.
        confidence: the probability at which a class is accepted.
        keep_film: whether to keep the states on the way.

    Returns:
        The nearest, and the classes that the pictures were taken for.
    """
    steps, image = len(inversion.timesteps), inversion.image
    found = class_probabilities(classifier, image)
    original = found.argmax(dim=-1)
    nearest = Nearest(image, _of(found, labels), confidence, steps, keep_film)
    wanted = nearest.distances.isinf().nonzero().flatten()
    if not len(wanted):
        return nearest, original
    inversion.invert(make_sampling(original, 0.0))
    levels = sorted({max(1, round(strength * steps)) for strength in strengths})
    for scale in scales:
        rows = wanted
        for level in levels:
            if len(rows):
                film = inversion.draw(make_sampling(labels[rows], scale), level, rows)
                probabilities = _of(class_probabilities(classifier, film[-1]), labels[rows])
                rows = nearest.offer(film, probabilities, rows, level / steps, scale)
    return nearest, original


def class_probabilities(classifier: Any, images: Tensor) -> Tensor:
    """p(y | x_0) of clean images in the model's range, (B, K), in float32 at least."""
    logits = logits_of(classifier(images.to(dtype_of(classifier)), 0))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)


def _of(probabilities: Tensor, labels: Tensor) -> Tensor:
    return probabilities.gather(-1, labels[:, None])[:, 0]


# --- what a call is given --------------------------------------------------------------------------------------------


def check_search(classifier: Any, scheduler: Any, labels: Tensor, confidence: Any, proximity: Any) -> None:
    """Refuses a pipeline without a classifier or ᾱ, labels that are not classes, and numbers out of their range.

    Raises:
        ValueError: then.
    """
    if classifier is None:
        raise ValueError("`counterfactual` needs a classifier, which is to accept the change, got none; open with one.")
    if getattr(classifier, "reads_x0", False) or type(classifier).__name__ == "ClassifierSet":
        raise ValueError(
            f"`counterfactual` needs one classifier of noisy images, got a {type(classifier).__name__}; open with one."
        )
    kind, name = config_of(scheduler, "prediction_type"), type(scheduler).__name__
    in_xt = hasattr(scheduler, "alphas_cumprod") and getattr(scheduler, "scales_input", True)
    if not in_xt or kind not in SCORE_PREDICTIONS:
        raise ValueError(
            f"`scheduler` must be of models of x_t = √ᾱ x_0 + √(1-ᾱ) ε that predict one of {SCORE_PREDICTIONS}, got "
            f"{name} with {kind!r}; use a pipeline of the DDPM family."
        )
    if labels.is_floating_point():
        raise ValueError(
            f"`class_labels` must be classes, got probabilities of shape {tuple(labels.shape)}; a counterfactual is of "
            "one class."
        )
    if not _is_number(confidence) or not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be a probability in (0, 1), got {confidence!r}.")
    if not _is_number(proximity) or not 0 <= proximity < 1:
        raise ValueError(f"`proximity` must be in [0, 1), where 0 does not pull, got {proximity!r}.")


def check_values(name: str, given: Any, most: float = math.inf) -> list[float]:
    """One value or several to try, each positive and at most `most`; ascending.

    Raises:
        ValueError: for anything else.
    """
    values = list(given) if isinstance(given, Sequence) else [given]
    if not values or not all(_is_number(value) and 0 < value <= most and value < math.inf for value in values):
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise ValueError(f"`{name}` must be one number or several to try, each over 0{limit}, got {given!r}.")
    return sorted(float(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
