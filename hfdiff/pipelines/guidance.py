"""Classifier guidance: the gradient g = w ∇ log p(y | x_t) and its two uses (Dhariwal & Nichol 2021, section 4).

The mean shift (algorithm 1) moves a Gaussian step's mean by Σ g. The score shift (algorithm 2) moves the predicted
noise by -√(1-ᾱ) g, since ∇ log p(x_t | y) = ∇ log p(x_t) + ∇ log p(y | x_t) and ε = -√(1-ᾱ) ∇ log p(x_t).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .components import dtype_of
from .composition import composed_log_likelihood


def log_likelihood(logits: Tensor, class_labels: Tensor, temperatures: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """log p(y | x) of each row of logits (B, K), in float32 at least.

    `class_labels` is (B,) of class indices; (B, K) of class probabilities q, for which it is Σ_k q_k log p(k | x); or
    (B, J, K + 1) of [`~composition.composed_labels`].

    `temperatures` (τ_1, τ_2) other than 1 put τ_1 f_k - log Σ_j exp(τ_2 f_j) of the logits f in place of log p(k | x),
    the joint energy and the marginal (Ma et al., "Elucidating the Design Space of Classifier-Guided Diffusion
    Generation", 2023, section 4.3).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.log_softmax(dim=-1)
    if temperatures != (1.0, 1.0):
        joint, marginal = temperatures
        log_probs = joint * logits - (marginal * logits).logsumexp(dim=-1, keepdim=True)
    if class_labels.ndim == 3:
        return composed_log_likelihood(log_probs, class_labels)
    if class_labels.is_floating_point():
        return (class_labels * log_probs).sum(dim=-1)
    return log_probs.gather(-1, class_labels[:, None])[:, 0]


def classifier_gradient(
    classifier: Callable[[Tensor, Any], Any],
    sample: Tensor,
    timestep: int | float | Tensor,
    class_labels: Tensor,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """g = w ∇ log p(y | x_t) with respect to x_t, by one backward pass through the classifier alone.

    Args:
        classifier: maps (x_t, t) to logits (B, K), or to an object that has them as `.logits`.
        sample: x_t, (B, C, H, W), as the classifier sees it.
        timestep: t, one for all or (B,).
        class_labels: (B,) class indices, or (B, K) class probabilities q, which give Σ_k q_k ∇ log p(k | x_t).
        guidance_scale: w, one for all or (B,).

    Returns:
        g, of the sample's shape and dtype; no graph is kept.
    """
    return classifier_guidance(classifier, sample, timestep, class_labels, guidance_scale)[1]


def classifier_guidance(
    classifier: Callable[[Tensor, Any], Any],
    sample: Tensor,
    timestep: int | float | Tensor,
    class_labels: Tensor,
    guidance_scale: float | Tensor = 1.0,
    temperatures: tuple[float, float] = (1.0, 1.0),
    entropy_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """w log p(y | x_t), (B,), and its gradient g; arguments as of [`classifier_gradient`], [`log_likelihood`].

    With `entropy_scale`, g is also scaled by [`inverse_entropy`].
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made in inference mode cannot be saved for the backward pass; their copies can.
        xt, class_labels = sample.detach().clone().requires_grad_(), class_labels.clone()
        timestep = timestep.clone() if isinstance(timestep, Tensor) else timestep
        output = classifier(xt.to(_dtype(classifier, xt)), timestep)
        logits = logits_of(output)
        log_prob = log_likelihood(logits, class_labels, temperatures)
        (gradient,) = torch.autograd.grad(log_prob.sum(), xt)
    if entropy_scale:
        gradient = per_image(inverse_entropy(logits.detach()), gradient) * gradient
    return guidance_scale * log_prob.detach(), per_image(guidance_scale, gradient) * gradient


def logits_of(output: Any) -> Tensor:
    """The logits that a classifier gives, as a tensor or as the `.logits` of what it gives."""
    return output if isinstance(output, Tensor) else output.logits


def inverse_entropy(logits: Tensor) -> Tensor:
    """log K / H(p) of each row of logits (B, K), at least 1: the scale that restores a gradient which vanishes early.

    Zheng et al., "Entropy-driven Sampling and Training Scheme for Conditional Diffusion Generation", ECCV 2022, eq. 7.
    """
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return math.log(logits.shape[-1]) / entropy.clamp(min=torch.finfo(entropy.dtype).eps)


def per_image(scale: float | Tensor, images: Tensor) -> float | Tensor:
    """A number for all images, or one for each, (B,), in a shape that multiplies (B, C, H, W)."""
    return scale.to(images).view(-1, *[1] * (images.ndim - 1)) if isinstance(scale, Tensor) else scale


def _dtype(classifier: Any, xt: Tensor) -> torch.dtype:
    """What a module with weights computes in, which is the dtype of its input."""
    parameters = classifier.parameters() if isinstance(classifier, nn.Module) else ()
    return dtype_of(classifier) if any(parameter.is_floating_point() for parameter in parameters) else xt.dtype


def shift_mean(mean: Tensor, variance: Tensor | float, gradient: Tensor) -> Tensor:
    """μ + Σ g (algorithm 1). `variance` is Σ, never its logarithm or root; it broadcasts."""
    return mean + variance * gradient


def shift_epsilon(eps: Tensor, alpha_bar: Tensor | float, gradient: Tensor) -> Tensor:
    """ε̂ = ε - √(1-ᾱ) g (algorithm 2). `alpha_bar` is ᾱ_t, a float or broadcastable."""
    return eps - (1 - alpha_bar) ** 0.5 * gradient


def noisy_input(scheduler: Any, x0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    """What a model is given of x_t: √ᾱ x_0 + √(1-ᾱ) ε of a DDPM, x_0 + σ ε of an NCSN, or the latter scaled."""
    return scheduler.scale_model_input(scheduler.add_noise(x0, noise, timestep), timestep)
