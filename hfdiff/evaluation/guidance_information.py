"""How many nats of the class a classifier's gradient carries into sampling, and how many its probabilities know.

The class lowers the error of denoising, and the information on it is what it lowers it by (I-MMSE; Guo, Shamai & Verdú
2005, and per level of noise Kong et al., "Information-Theoretic Diffusion", ICLR 2023): with λ = log SNR and
h = √(1-ᾱ) ∇ log p(y | x_t), the shift of the noise that guidance makes at scale 1,

    ½ ∫ E[‖ε̂ - ε‖² - ‖ε̂ - h - ε‖²] dλ = I(x_t; y)

from pure noise down to x_t, where denoiser and gradient are exact. A gradient that errs carries less. The
log-likelihood estimates the same information from the probabilities alone: I(x_t; y) ≥ H(y) + E[log p(y | x_t)].
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..pipelines.guidance import classifier_guidance, noisy_input
from ..schedulers.gaussian import convert

LEAST_LOG_SNR = -12.0  # below it nothing is known: I(x_t; y) ≤ ½ SNR Var(x_0), 0.002 nats for 784 pixels of variance 1


class GuidanceInformation(NamedTuple):
    """What a classifier says of the class, in nats, by level of noise and in all.

    Args:
        timesteps: the levels, from noisy to clean, (L,).
        log_snr: λ of each, log ᾱ/(1-ᾱ), (L,).
        carried_up_to: nats that the gradient carries from pure noise down to each level, (L,).
        known_up_to: nats that the probabilities know at each level, (L,).
        best_scales: the scale at which each level's gradient carries most, (L,); 1 where it is exact.
        entropy: H(y) of the labels.
    """

    timesteps: Tensor
    log_snr: Tensor
    carried_up_to: Tensor
    known_up_to: Tensor
    best_scales: Tensor
    entropy: float

    @property
    def carried(self) -> float:
        """Nats that the gradient carries, over all levels."""
        return float(self.carried_up_to[-1])

    @property
    def known(self) -> float:
        """Nats that the probabilities know at the cleanest level."""
        return float(self.known_up_to[-1])

    def __str__(self) -> str:
        return (
            f"the gradient carries {self.carried:.2f} nats, the probabilities know {self.known:.2f} of "
            f"{self.entropy:.2f}"
        )


@torch.no_grad()
def guidance_information(
    unet: Callable[..., Any],
    classifier: Callable[[Tensor, Tensor], Any] | None,
    scheduler: Any,
    x0: Any,
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    guidance_scale: float = 1.0,
    num_levels: int = 60,
    batch_size: int = 256,
) -> GuidanceInformation:
    """Measures a classifier's gradient against a denoiser, without sampling.

    The sampling error of `carried` falls with the number of images; 500 images give it to about 0.05 nats.

    Args:
        unet: ε̂, x_0 or v from (x_t, t), as the scheduler's `prediction_type` says, with an output `.sample`.
        classifier: maps (x_t, t) to logits (B, K); None takes for h the difference of a class-conditional UNet that was
            trained with dropped classes, ε̂(x_t) - ε̂(x_t, y); then nothing is `known`, NaN.
        scheduler: the noise levels, hfdiff's DDPMScheduler or AnnealedLangevinScheduler.
        x0: clean images, (N, C, H, W), a tensor or an `hfdiff.data.images.ImageSet`; unseen ones.
        labels: their classes, (N,), or their probabilities, (N, K).
        generator: source of the noise.
        guidance_scale: w, which multiplies the gradient.
        num_levels: L, spread evenly in log SNR over the chain.
        batch_size: images per model call.

    Raises:
        ValueError: when there is not one label for each of at least one image, or the scheduler's models are not given
            x_t at unit variance.
    """
    if not len(x0) or len(x0) != len(labels):
        raise ValueError(f"`labels` must be one per image, got {len(labels)} for {len(x0)} images.")
    if not getattr(scheduler, "scales_input", True):
        raise ValueError(
            f"`scheduler` must give its models √ᾱ x_0 + √(1-ᾱ) ε, got a {type(scheduler).__name__} that does not scale "
            "its input; use another model."
        )
    log_snr = _log_snr(scheduler)
    timesteps = spread_levels(log_snr, num_levels)
    entropy = label_entropy(labels)
    means = []
    for timestep in timesteps.tolist():
        sums = torch.zeros(3, dtype=torch.float64)
        for images, classes in _batches(x0, labels, batch_size, getattr(unet, "device", torch.device("cpu"))):
            sums += _level_sums(unet, classifier, scheduler, images, classes, timestep, generator)
        means.append(sums / len(x0))
    gain, square, likelihood = torch.stack(means, dim=1)
    levels = log_snr[timesteps]
    per_level = guidance_scale * gain - guidance_scale**2 * square / 2  # ½ (‖ε̂-ε‖² - ‖ε̂-wh-ε‖²)
    carried = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(per_level, levels)])
    return GuidanceInformation(timesteps, levels, carried, entropy + likelihood, gain / square, entropy)


def spread_levels(log_snr: Tensor, count: int) -> Tensor:
    """Timesteps whose log SNR is spread evenly, from noisy to clean, (L,) with L ≤ count.

    Args:
        log_snr: of each timestep, descending, (T,).
        count: how many at most; each timestep counts once.
    """
    targets = torch.linspace(float(log_snr[-1].clamp(min=LEAST_LOG_SNR)), float(log_snr[0]), count, dtype=torch.float64)
    nearest = (log_snr.double()[:, None] - targets).abs().argmin(dim=0)
    return nearest.unique().flip(0)


def label_entropy(labels: Tensor) -> float:
    """H(y) of classes (N,) or class probabilities (N, K) in nats, by their frequencies."""
    counts = labels.double().sum(dim=0) if labels.is_floating_point() else labels.bincount().double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def _log_snr(scheduler: Any) -> Tensor:
    alpha_bar = scheduler.alphas_cumprod.double().cpu()
    return (alpha_bar / (1 - alpha_bar)).log()


def _batches(x0: Any, labels: Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x0), size):
        rows = slice(start, start + size)
        yield x0[rows].to(device), labels[rows].to(device)


def _level_sums(
    unet: Any,
    classifier: Any,
    scheduler: Any,
    x0: Tensor,
    labels: Tensor,
    timestep: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The sums over a batch of ⟨ε̂ - ε, h⟩, ‖h‖² and log p(y | x_t) at one level, (3,), float64."""
    t = torch.full((len(x0),), timestep, device=x0.device)
    noise = randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    xt = noisy_input(scheduler, x0, t, noise)
    alpha_bar = float(scheduler.alphas_cumprod[timestep])
    if classifier is None:
        null = torch.full((len(x0),), unet.config["num_class_embeds"] - 1, device=x0.device)
        eps = _predict_noise(unet, scheduler, xt, t, alpha_bar, class_labels=null)
        shift = eps - _predict_noise(unet, scheduler, xt, t, alpha_bar, class_labels=labels)
        likelihood = torch.full((len(x0),), torch.nan)
    else:
        eps = _predict_noise(unet, scheduler, xt, t, alpha_bar)
        likelihood, gradient = classifier_guidance(classifier, xt, t, labels)
        shift = (1 - alpha_bar) ** 0.5 * gradient
    values = ((eps - noise) * shift).double().sum(), shift.double().square().sum(), likelihood.double().sum()
    return torch.stack([value.cpu() for value in values])


def _predict_noise(unet: Any, scheduler: Any, xt: Tensor, t: Tensor, alpha_bar: float, **condition: Tensor) -> Tensor:
    output = unet(xt, t, **condition).sample[:, : xt.shape[1]]  # without a learned variance
    return convert(output, xt, alpha_bar, scheduler.config["prediction_type"], "epsilon")


def plot_guidance_information(information: GuidanceInformation, path: str | Path) -> None:
    """Draws nats carried and known over log SNR, from noise, left, to image, right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(information.entropy, color="0.6", linestyle="--", label="H(y)")
    axes.plot(information.log_snr, information.known_up_to, label="known by the probabilities")
    axes.plot(information.log_snr, information.carried_up_to, label="carried by the gradient")
    axes.set(xlabel="log SNR (noise to image)", ylabel="nats")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
