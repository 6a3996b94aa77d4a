"""The Gaussian process of DDPM (Ho et al. 2020): q(x_t | x_0), its posterior, conversions, KL and likelihood.

x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε with ε ~ N(0, I). Larger t is noisier, ᾱ_t falls from 1 towards 0. Every function takes ᾱ as
a float or a tensor that broadcasts against the images; nothing here draws random numbers.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Level = float | Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score")


def x0_coefficients(prediction_type: str, alpha_bar: Level) -> tuple[Level, Level]:
    """Coefficients (a, b) of x_0 = a x_t + b m, where m is what the model predicts.

    epsilon: ε (Ho et al. 2020, eq. 15); sample: x_0; v_prediction: v = √ᾱ ε - √(1-ᾱ) x_0 (Salimans & Ho 2022,
    appendix D); score: s = -ε/√(1-ᾱ) (Song et al. 2021).

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        alpha_bar: ᾱ_t in (0, 1).

    Raises:
        ValueError: for another prediction type.
    """
    if prediction_type == "epsilon":
        return (1 / alpha_bar) ** 0.5, -((1 / alpha_bar - 1) ** 0.5)
    if prediction_type == "sample":
        return 0.0 * alpha_bar, 1.0 + 0.0 * alpha_bar
    if prediction_type == "v_prediction":
        return alpha_bar**0.5, -((1 - alpha_bar) ** 0.5)
    if prediction_type == "score":
        return (1 / alpha_bar) ** 0.5, (1 - alpha_bar) / alpha_bar**0.5
    raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")


def to_x0(output: Tensor, xt: Tensor, alpha_bar: Level, prediction_type: str) -> Tensor:
    """The x_0 that a model output of the given type stands for; shapes as `xt`."""
    on_xt, on_output = x0_coefficients(prediction_type, alpha_bar)
    return on_xt * xt + on_output * output


def from_x0(x0: Tensor, xt: Tensor, alpha_bar: Level, prediction_type: str) -> Tensor:
    """The model output of the given type that stands for `x0`, the inverse of [`to_x0`]; shapes as `xt`."""
    on_xt, on_output = x0_coefficients(prediction_type, alpha_bar)
    return (x0 - on_xt * xt) / on_output


def convert(output: Tensor, xt: Tensor, alpha_bar: Level, source: str, target: str) -> Tensor:
    """Converts a prediction from one type to another.

    Args:
        output: the prediction, (B, C, H, W).
        xt: the noisy images it was made for, of the same shape.
        alpha_bar: ᾱ_t in (0, 1), a float or broadcastable.
        source: type of `output`, one of `PREDICTION_TYPES`.
        target: type wanted.

    Returns:
        The prediction as `target`; `output` itself where the types agree.
    """
    if source == target:
        return output
    return from_x0(to_x0(output, xt, alpha_bar, source), xt, alpha_bar, target)


def clip_x0_(x0: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Keeps a prediction of x_0 in range as a scheduler's config says, in place where it can.

    With `thresholding`, each image is clipped to its own percentile s of |x_0|, 1 ≤ s ≤ `sample_max_value`, and divided
    by s (Saharia et al. 2022, section 2.3); else with `clip_sample` it is clipped to ±`clip_sample_range`.
    """
    if config.get("thresholding"):
        threshold = torch.quantile(x0.abs().flatten(1), config["dynamic_thresholding_ratio"], dim=1)
        threshold = threshold.clamp(min=1, max=config["sample_max_value"]).view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-threshold, threshold) / threshold
    if config.get("clip_sample"):
        limit = config.get("clip_sample_range", 1.0)
        return x0.clamp_(-limit, limit)
    return x0


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0) = N(on_x0 x_0 + on_xt x_t, variance), per step (Ho et al. 2020, eqs. 6 and 7)."""

    on_x0: Tensor
    on_xt: Tensor
    variance: Tensor
    beta: Tensor


def posterior(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Posterior:
    """Coefficients of the posterior for steps from ᾱ to ᾱ_prev, the less noisy level; any shape."""
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    return Posterior(
        on_x0=beta * alpha_bar_prev**0.5 / (1 - alpha_bar),
        on_xt=(1 - alpha_bar_prev) * alpha**0.5 / (1 - alpha_bar),
        variance=beta * (1 - alpha_bar_prev) / (1 - alpha_bar),
        beta=beta,
    )


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) per element, in nats; arguments broadcast."""
    ratio = torch.exp(log_variance1 - log_variance2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + ratio + distance)  # in the original's order, for its rounding


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Φ(x) by the tanh approximation (Page 1977), as guided-diffusion computes likelihoods; error under 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log p(x) of 8-bit images under a Gaussian integrated over each level's bin (Ho et al. 2020, eq. 13).

    Args:
        x: images in [-1, 1] with 256 levels, (B, C, H, W).
        means: means of the Gaussian, of the same shape.
        log_scales: logarithms of its standard deviations, of the same shape.

    Returns:
        Log-likelihood per element, in nats.
    """
    inverse_scale = torch.exp(-log_scales)
    upper = approx_standard_normal_cdf(inverse_scale * (x - means + 1 / 255))
    lower = approx_standard_normal_cdf(inverse_scale * (x - means - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
