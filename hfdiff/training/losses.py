"""Training losses, as functions of clean images, timesteps and noise; nothing here draws random numbers.

Images are (B, C, H, W) in [-1, 1]; `timestep` is (B,), larger is noisier; noise ε is unit normal, of the images' shape.
What is plural gives one number per image, (B,), to be reduced by [`weighted_mean`]; the others give that mean.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..pipelines.guidance import log_likelihood, noisy_input, shift_epsilon
from ..schedulers.gaussian import convert
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..schedulers.scheduling_ddpm import LEARNED_VARIANCES, DDPMScheduler
from ..schedulers.variational_bound import clipped, variational_terms
from .settings import VLB_WEIGHT, LossType, check_objective

Model = Callable[..., Any]  # (x_t, t), and class_labels if there are any, to an output with `.sample` or `.logits`


TARGETS: dict[str, Callable[[DDPMScheduler, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda scheduler, x0, timestep, noise: noise,
    "sample": lambda scheduler, x0, timestep, noise: x0,
    "v_prediction": lambda scheduler, x0, timestep, noise: scheduler.get_velocity(x0, noise, timestep),
    "prev_sample": lambda scheduler, x0, timestep, noise: scheduler.q_posterior(
        x0, scheduler.q_sample(x0, timestep, noise), timestep
    )[0],
}

# What ‖m - target‖² of each prediction is multiplied by to be min(SNR, γ) ‖x̂_0 - x_0‖².
MIN_SNR_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "epsilon": lambda snr, gamma: (gamma / snr).clamp(max=1),  # min(SNR, γ)/SNR, also where the SNR is 0
    "sample": lambda snr, gamma: snr.clamp(max=gamma),
    "v_prediction": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
}


def weighted_mean(losses: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean of losses (B,), each times its importance weight (B,) where timesteps were not drawn uniformly."""
    return losses.mean() if weight is None else (losses * weight).mean()


# --- denoising -------------------------------------------------------------------------------------------------------


def ddpm_loss(unet: Model, scheduler: DDPMScheduler, x0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    """‖m(x_t, t) - target‖², averaged over elements: L_simple of Ho et al. (2020), equation 14, for ε.

    The mean of [`ddpm_losses`] with its defaults; arguments as there.
    """
    return weighted_mean(ddpm_losses(unet, scheduler, x0, timestep, noise))


def ddpm_losses(
    unet: Model,
    scheduler: DDPMScheduler,
    x0: Tensor,
    timestep: Tensor,
    noise: Tensor,
    *,
    loss_type: LossType = "simple",
    snr_gamma: float | None = None,
    vlb_weight: float = VLB_WEIGHT,
    class_labels: Tensor | None = None,
) -> Tensor:
    """The loss of each image, (B,), by one of three objectives.

    - simple: L_simple, [`simple_losses`] (Ho et al. 2020, equation 14);
    - vlb: T' times [`variational_terms`], an estimate of the whole bound in bits per dimension;
    - hybrid: simple + `vlb_weight` · vlb, where the bound trains the variance and sends no gradient into the mean
      (Nichol & Dhariwal 2021, section 3.1).

    T' is the length of the scheduler's chain, the trained one unless it was respaced. In guided-diffusion's terms and
    up to its factors, these are MSE, RESCALED_KL and RESCALED_MSE; x_0 is not clipped.

    Args:
        unet: m, which predicts what the scheduler's `prediction_type` says, and the variance where that is learned.
        scheduler: the noise levels.
        x0: clean images.
        timestep: t, of the scheduler's chain.
        noise: ε.
        loss_type: "simple", "vlb" or "hybrid".
        snr_gamma: γ of [`simple_losses`].
        vlb_weight: λ ≥ 0.
        class_labels: y, (B,), for a class-conditional UNet.

    Raises:
        ValueError: for another objective, or one that the scheduler's variance or `snr_gamma` does not allow.
    """
    check_objective(loss_type, scheduler.config["variance_type"], scheduler.config["prediction_type"], snr_gamma)
    xt = scheduler.q_sample(x0, timestep, noise)
    condition = {} if class_labels is None else {"class_labels": class_labels}
    output = unet(xt, timestep, **condition).sample
    prediction, variance = _split(scheduler, output, x0.shape[1])
    if loss_type == "vlb":
        return _vlb(scheduler, output, x0, xt, timestep)
    losses = simple_losses(prediction, scheduler, x0, timestep, noise, snr_gamma)
    if loss_type == "hybrid":
        frozen = torch.cat([prediction.detach(), variance], dim=1)
        losses = losses + vlb_weight * _vlb(scheduler, frozen, x0, xt, timestep)
    return losses


def _split(scheduler: DDPMScheduler, output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The prediction, and the channels of a learned variance, of which there are none for a fixed one."""
    kind = scheduler.config["variance_type"]
    expected = channels * (2 if kind in LEARNED_VARIANCES else 1)
    if output.shape[1] != expected:
        raise ValueError(
            f"`unet` must have {expected} output channels for images of {channels} and `variance_type` {kind!r}, got "
            f"{output.shape[1]}; change its `out_channels` or the scheduler."
        )
    return output[:, :channels], output[:, channels:]


def simple_losses(
    prediction: Tensor,
    scheduler: DDPMScheduler,
    x0: Tensor,
    timestep: Tensor,
    noise: Tensor,
    snr_gamma: float | None = None,
) -> Tensor:
    """‖m - target‖² of each image, averaged over its elements, (B,).

    With `snr_gamma` it is weighted by min-SNR-γ (Hang et al. 2023, section 3.4): whatever the prediction type, the loss
    is min(SNR, γ) ‖x̂_0 - x_0‖² for the x̂_0 that the prediction stands for, with SNR = ᾱ/(1-ᾱ).

    Args:
        prediction: m, (B, C, H, W), of the scheduler's prediction type, without a learned variance's channels.
        scheduler: the noise levels.
        x0: clean images.
        timestep: t.
        noise: ε.
        snr_gamma: γ > 0; None weights every timestep alike.
    """
    kind = scheduler.config["prediction_type"]
    target = TARGETS[kind](scheduler, x0, timestep, noise)
    losses = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)
    if snr_gamma is None:
        return losses
    alpha_bar = scheduler.alphas_cumprod.to(timestep.device)[timestep]
    return losses * MIN_SNR_WEIGHTS[kind](alpha_bar / (1 - alpha_bar), snr_gamma).to(losses)


# --- denoising score matching ----------------------------------------------------------------------------------------


def score_matching_losses(
    model: Model, scheduler: AnnealedLangevinScheduler, x0: Tensor, timestep: Tensor, noise: Tensor
) -> Tensor:
    """½ ‖σ_t s(x_0 + σ_t ε, t) + ε‖² of each image, summed over its elements, (B,).

    Denoising score matching, ½ ‖s + ε/σ‖², weighted by λ(σ) = σ² (Song & Ermon 2019, equations 5 and 6).

    Args:
        model: predicts what the scheduler's `prediction_type` says.
        scheduler: the noise levels.
        x0: clean images, in the model's range.
        timestep: t.
        noise: ε.
    """
    xt = scheduler.add_noise(x0, noise, timestep)
    output = model(scheduler.scale_model_input(xt, timestep), timestep).sample
    sigma = scheduler.sigmas.to(xt)[timestep].view(-1, *[1] * (xt.ndim - 1))
    residual = sigma * scheduler.score(output, timestep, xt) + noise
    return 0.5 * residual.square().flatten(1).sum(dim=1)


# --- the variational bound -------------------------------------------------------------------------------------------


def _vlb(scheduler: DDPMScheduler, output: Tensor, x0: Tensor, xt: Tensor, timestep: Tensor) -> Tensor:
    """The whole bound, estimated from the term at each image's timestep, in bits per dimension, (B,)."""
    p = clipped(scheduler, False).p_mean_variance(output, timestep, xt)
    return len(scheduler.timesteps) * variational_terms(p, scheduler, x0, xt, timestep)


# --- classification --------------------------------------------------------------------------------------------------


def classification_loss(
    classifier: Model,
    scheduler: DDPMScheduler | AnnealedLangevinScheduler,
    x0: Tensor,
    timestep: Tensor,
    noise: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy -log p(y | x_t) of noisy images, in nats (Dhariwal & Nichol 2021, section 4).

    Args:
        classifier: maps (x_t, t) to logits (B, K).
        scheduler: the noise levels.
        x0: clean images.
        timestep: t.
        noise: ε.
        labels: y, class indices (B,) or probabilities (B, K).
        weight: importance weights, (B,).
    """
    logits = classifier(noisy_input(scheduler, x0, timestep, noise), timestep).logits
    return weighted_mean(-log_likelihood(logits, labels), weight)


def guided_denoising_loss(
    classifier: Model,
    unet: Model,
    scheduler: DDPMScheduler | AnnealedLangevinScheduler,
    x0: Tensor,
    timestep: Tensor,
    noise: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    teacher: Model | None = None,
) -> Tensor:
    """‖ε_θ(x_t) - √(1-ᾱ_t) ∇ log p(y | x_t) - ε‖², averaged over elements: how well the guided noise denoises class y.

    The denoising likelihood score matching loss of Chao et al., "Denoising Likelihood Score Matching for Conditional
    Score-based Data Generation", ICLR 2022; in units of ε, that is, the error of the score weighted by 1-ᾱ_t.

    Sampling uses the classifier's gradient, which cross entropy leaves free: two classifiers with nearly the same
    probabilities can point in very different directions. The noise that belongs to p(x_t | y) is E[ε | x_t, y], which
    alone minimises this loss, so where the UNet is exact the gradient it asks for is that of Bayes' rule,
    ∇ log p(x_t | y) = ∇ log p(x_t) + ∇ log p(y | x_t). A guidance scale of 1 is then right, and needs no tuning; where
    the UNet errs, the gradient also learns to make up for it.

    The noise ε itself is a target far noisier than the gradient is large. A class-conditional UNet predicts its mean,
    E[ε | x_t, y]; with such a `teacher` that takes the place of ε, and the gradient is distilled from the difference
    of two UNets, √(1-ᾱ_t) ∇ log p(y | x_t) = ε_θ(x_t) - ε_teacher(x_t, y). They should differ in the class alone, as
    one network told the class and told none does.

    Args:
        classifier: maps (x_t, t) to logits (B, K); receives gradients, through two backward passes.
        unet: predicts what the scheduler's `prediction_type` says; is frozen here.
        scheduler: the noise levels of both; an NCSN's must scale the model's input, to √ᾱ x_0 + √(1-ᾱ) ε, too.
        x0: clean images.
        timestep: t.
        noise: ε.
        labels: y, class indices (B,) or probabilities (B, K).
        weight: importance weights, (B,).
        teacher: predicts as `unet` does from (x_t, t) and the labels; is frozen here.
    """
    xt = noisy_input(scheduler, x0, timestep, noise).requires_grad_()
    alpha_bar = scheduler.alphas_cumprod.to(xt.device)[timestep].to(xt.dtype).view(-1, *[1] * (xt.ndim - 1))

    def predict_noise(model: Model, **condition: Tensor) -> Tensor:
        prediction = model(xt, timestep, **condition).sample[:, : xt.shape[1]]  # without a learned variance
        return convert(prediction, xt, alpha_bar, scheduler.config["prediction_type"], "epsilon")

    with torch.no_grad():
        eps = predict_noise(unet)
        target = noise if teacher is None else predict_noise(teacher, class_labels=labels)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        likelihood = log_likelihood(classifier(xt, timestep).logits, labels).sum()
        (gradient,) = torch.autograd.grad(likelihood, xt, create_graph=True)
    losses = F.mse_loss(shift_epsilon(eps, alpha_bar, gradient), target, reduction="none").flatten(1).mean(dim=1)
    return weighted_mean(losses, weight)
