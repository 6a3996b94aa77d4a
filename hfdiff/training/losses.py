"""Training losses, as functions of clean images, timesteps and noise; nothing here draws random numbers.

Images are (B, C, H, W) in [-1, 1]; `timestep` is (B,), larger is noisier; noise ε is unit normal, of the images' shape.
Each loss is a scalar, the mean over the batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..pipelines.guidance import log_likelihood, shift_epsilon
from ..schedulers.gaussian import convert
from ..schedulers.scheduling_ddpm import DDPMScheduler

Model = Callable[[Tensor, Tensor], Any]  # (x_t, t) to an output with `.sample`, or with `.logits`

TARGETS: dict[str, Callable[[DDPMScheduler, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda scheduler, x0, timestep, noise: noise,
    "sample": lambda scheduler, x0, timestep, noise: x0,
    "v_prediction": lambda scheduler, x0, timestep, noise: scheduler.get_velocity(x0, noise, timestep),
}


def ddpm_loss(unet: Model, scheduler: DDPMScheduler, x0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    """‖m(x_t, t) - target‖², averaged over elements: L_simple of Ho et al. (2020), equation 14, for ε.

    Args:
        unet: m, which predicts what the scheduler's `prediction_type` says: epsilon, sample (x_0) or v_prediction.
        scheduler: the noise levels.
        x0: clean images.
        timestep: t.
        noise: ε.

    Raises:
        ValueError: for a prediction type without a target.
    """
    kind = scheduler.config["prediction_type"]
    if kind not in TARGETS:
        raise ValueError(f"The scheduler's `prediction_type` must be one of {tuple(TARGETS)} to train, got {kind!r}.")
    output = unet(scheduler.q_sample(x0, timestep, noise), timestep).sample
    return F.mse_loss(output, TARGETS[kind](scheduler, x0, timestep, noise))


def classification_loss(
    classifier: Model, scheduler: DDPMScheduler, x0: Tensor, timestep: Tensor, noise: Tensor, labels: Tensor
) -> Tensor:
    """Cross entropy -log p(y | x_t) of noisy images, in nats (Dhariwal & Nichol 2021, section 4).

    Args:
        classifier: maps (x_t, t) to logits (B, K).
        scheduler: the noise levels.
        x0: clean images.
        timestep: t.
        noise: ε.
        labels: y, class indices (B,) or probabilities (B, K).
    """
    logits = classifier(scheduler.q_sample(x0, timestep, noise), timestep).logits
    return -log_likelihood(logits, labels).mean()


def guided_denoising_loss(
    classifier: Model,
    unet: Model,
    scheduler: DDPMScheduler,
    x0: Tensor,
    timestep: Tensor,
    noise: Tensor,
    labels: Tensor,
) -> Tensor:
    """‖ε_θ(x_t) - √(1-ᾱ_t) ∇ log p(y | x_t) - ε‖², averaged over elements: how well the guided noise denoises class y.

    The denoising likelihood score matching loss of Chao et al., "Denoising Likelihood Score Matching for Conditional
    Score-based Data Generation", ICLR 2022; in units of ε, that is, the error of the score weighted by 1-ᾱ_t.

    Sampling uses the classifier's gradient, which cross entropy leaves free: two classifiers with nearly the same
    probabilities can point in very different directions. The noise that belongs to p(x_t | y) is E[ε | x_t, y], which
    alone minimises this loss, so where the UNet is exact the gradient it asks for is that of Bayes' rule,
    ∇ log p(x_t | y) = ∇ log p(x_t) + ∇ log p(y | x_t). A guidance scale of 1 is then right, and needs no tuning; where
    the UNet errs, the gradient also learns to make up for it.

    Args:
        classifier: maps (x_t, t) to logits (B, K); receives gradients, through two backward passes.
        unet: predicts what the scheduler's `prediction_type` says; is frozen here.
        scheduler: the noise levels of both.
        x0: clean images.
        timestep: t.
        noise: ε.
        labels: y, class indices (B,) or probabilities (B, K).
    """
    xt = scheduler.q_sample(x0, timestep, noise).requires_grad_()
    alpha_bar = scheduler.alphas_cumprod.to(xt.device)[timestep].to(xt.dtype).view(-1, *[1] * (xt.ndim - 1))
    with torch.no_grad():
        eps = convert(unet(xt, timestep).sample, xt, alpha_bar, scheduler.config["prediction_type"], "epsilon")
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        likelihood = log_likelihood(classifier(xt, timestep).logits, labels).sum()
        (gradient,) = torch.autograd.grad(likelihood, xt, create_graph=True)
    return F.mse_loss(shift_epsilon(eps, alpha_bar, gradient), noise)
