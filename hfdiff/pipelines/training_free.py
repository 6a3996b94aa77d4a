"""Guidance by log p(y | x_0) at the predicted x_0, without a network that has seen noise: the methods, unified.

Ye et al., "TFG: Unified Training-Free Guidance for Diffusion Models", NeurIPS 2024, algorithm 1, whose options contain
the methods before it. With x̂_0 = E[x_0 | x_t], which the UNet predicts, and f̃(x) = E f(x + γ √(1-ᾱ) δ), δ ~ N(0, I),

    g = ρ ∇_{x_t} log f̃(x̂_0(x_t)) + √ᾱ/(1-ᾱ) Δ_0,    Δ_0 ← Δ_0 + μ (1-ᾱ) ∇ log f̃(x̂_0 + Δ_0)

The first part goes through the UNet; the second, at x̂_0 alone, needs no gradient of it.

Differs from TFG: g is added to the score, as any guidance here is, so every scheduler follows it in its own step, and 1
is Bayes' rule; TFG adds ρ ∇ to x_{t-1} and √ᾱ μ ∇ to it. As a shift of x̂_0 moves the noise too, Δ_0 is that of
Universal Guidance (Bansal et al. 2023, eq. 9); 1-ᾱ is the variance of x_0 given x_t that Song et al. (2023) take.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .guide_checks import check_gradient, check_projected
from .inputs import check_choice, check_integer
from .steps import alpha_bars

AT_X0 = ("rho", "mu", "iterations", "smoothing", "samples", "rho_schedule", "mu_schedule", "projection")
SCHEDULES = ("constant", "increase", "decrease")


@dataclass(frozen=True)
class GuidanceMethod:
    """How the gradient of a log-probability becomes guidance; by default as DPS at x_0, plainly elsewhere.

    Args:
        rho: ρ, the strength of the gradient with respect to x_t, through the UNet; 1 is Bayes' rule.
        mu: μ, the strength of the gradient at x̂_0 alone.
        recurrence: how often each guided step is taken, with noise back to x_t in between.
        iterations: gradient steps at x̂_0, where μ > 0.
        smoothing: γ, the standard deviation of noise added to x̂_0, in units of √(1-ᾱ).
        samples: of that noise, over which probabilities are averaged.
        rho_schedule: "constant", or growing as α_t ("increase") or 1-α_t ("decrease") over the steps, of mean 1.
        mu_schedule: the same of μ.
        projection: maps x̂_0 + Δ_0 to a likely image, such as an autoencoder does; after each iteration.
        joint_temperature: τ_1 of τ_1 f_y - log Σ_k exp(τ_2 f_k) in place of log p(y | x), f being the logits.
        marginal_temperature: τ_2.
        entropy_scale: scale each image's gradient by log K / H(p), p being the classes' probabilities.

    Raises:
        ValueError: for a value out of its range.
    """

    rho: float = 1.0
    mu: float = 0.0
    recurrence: int = 1
    iterations: int = 1
    smoothing: float = 0.0
    samples: int = 1
    rho_schedule: str = "constant"
    mu_schedule: str = "constant"
    projection: Callable[[Tensor], Tensor] | None = None
    joint_temperature: float = 1.0
    marginal_temperature: float = 1.0
    entropy_scale: bool = False

    def __post_init__(self) -> None:
        for name in ("rho", "mu", "smoothing", "joint_temperature", "marginal_temperature"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < math.inf:
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")
        if self.projection is not None and not callable(self.projection):
            raise ValueError(f"`projection` must be a function of x_0, got {self.projection!r}; leave it out for none.")
        for name in ("recurrence", "iterations", "samples"):
            check_integer(name, getattr(self, name))
        for name in ("rho_schedule", "mu_schedule"):
            check_choice(name, getattr(self, name), SCHEDULES)
        if self.rho == self.mu == 0:
            raise ValueError("`rho` or `mu` must be above 0, got 0 for both; guidance is switched off by its scale.")

    @property
    def temperatures(self) -> tuple[float, float]:
        """(τ_1, τ_2)."""
        return self.joint_temperature, self.marginal_temperature

    @classmethod
    def dps(cls, rho: float = 1.0) -> "GuidanceMethod":
        """p(y | x_t) ≈ p(y | x̂_0) (Chung et al., "Diffusion Posterior Sampling", ICLR 2023, eq. 11)."""
        return cls(rho=rho)

    @classmethod
    def lgd(cls, samples: int = 10, smoothing: float = 1.0, rho: float = 1.0) -> "GuidanceMethod":
        """p(y | x_0) averaged over N(x̂_0, γ²(1-ᾱ) I) (Song et al., "Loss-Guided Diffusion", ICML 2023, LGD-MC)."""
        return cls(rho=rho, smoothing=smoothing, samples=samples)

    @classmethod
    def freedom(cls, recurrence: int = 4, rho: float = 1.0) -> "GuidanceMethod":
        """DPS with time travel (Yu et al., "FreeDoM", ICCV 2023, algorithm 2)."""
        return cls(rho=rho, recurrence=recurrence)

    @classmethod
    def mpgd(cls, mu: float = 1.0, projection: Callable[[Tensor], Tensor] | None = None) -> "GuidanceMethod":
        """The gradient at x̂_0 alone (He et al., "Manifold Preserving Guided Diffusion", ICLR 2024, algorithms 1, 3)."""
        return cls(rho=0.0, mu=mu, projection=projection)

    @classmethod
    def universal(cls, recurrence: int = 4, iterations: int = 1, rho: float = 1.0, mu: float = 1.0) -> "GuidanceMethod":
        """Both gradients, and recurrence (Bansal et al., "Universal Guidance for Diffusion Models", algorithm 1)."""
        return cls(rho=rho, mu=mu, recurrence=recurrence, iterations=iterations)

    @classmethod
    def tfg(
        cls,
        rho: float = 1.0,
        mu: float = 1.0,
        smoothing: float = 0.1,
        recurrence: int = 1,
        iterations: int = 4,
        samples: int = 4,
    ) -> "GuidanceMethod":
        """All of it, strengths growing with α_t, which TFG's search over its options found best (section 4)."""
        return cls(rho, mu, recurrence, iterations, smoothing, samples, "increase", "increase")

    @classmethod
    def elucd(cls, mu: float = 1.0, joint: float = 1.0, marginal: float = 0.5) -> "GuidanceMethod":
        """The gradient at x̂_0 by tempered logits (Ma et al., "Elucidating the Design Space of Classifier-Guided
        Diffusion Generation", ICLR 2024, section 4); see `softplus_beta` of [`CleanClassifier`]."""
        return cls(rho=0.0, mu=mu, joint_temperature=joint, marginal_temperature=marginal)

    @classmethod
    def ed_dpm(cls) -> "GuidanceMethod":
        """The scale by entropy, for classifiers of noisy images (Zheng et al. 2022, [`~guidance.inverse_entropy`])."""
        return cls(entropy_scale=True)


class GuidanceAtX0:
    """The gradient g of log f(x_0) at each step of a sampling.

    Args:
        method: its options.
        scheduler: whose timesteps are set.
        timesteps: descending.
        generator: of the smoothing's noise: one for all images, or one each.
    """

    def __init__(self, method: GuidanceMethod, scheduler: Any, timesteps: Tensor, generator: Any) -> None:
        self.method, self.generator = method, generator
        self.scheduler, self.timesteps = scheduler, timesteps

    def __call__(
        self,
        predict: Callable[[Tensor], tuple[Tensor, Tensor]],
        log_prob: Callable[[Tensor, Tensor], Tensor],
        xt: Tensor,
        alpha_bar: float,
        index: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The model output at x_t, g, and log f̃(x̂_0), (B,).

        Args:
            predict: x_t to the model output and x̂_0.
            log_prob: (x_t, x_0) to log f, (B,).
            xt: x_t, (B, C, H, W).
            alpha_bar: ᾱ_t.
            index: of the step.
        """
        rho = self.method.rho * self._factors(self.method.rho_schedule)[index]
        mu = self.method.mu * self._factors(self.method.mu_schedule)[index]
        with torch.inference_mode(False):  # tensors made in inference mode cannot be saved for a backward pass
            xt = xt.detach().clone()
            with torch.set_grad_enabled(rho > 0):
                xt.requires_grad_(rho > 0)
                output, x0 = predict(xt)
            smooth = self._smoothed(log_prob, x0, alpha_bar)
            gradient = torch.zeros_like(xt)
            if rho > 0:
                with torch.enable_grad():
                    value = smooth(xt, x0)
                    gradient = rho * self._gradient(value, xt, "x_t, or x_0", index)
                xt = xt.detach()
            if mu > 0:
                shift, first = self._shift(smooth, xt, x0.detach().clone(), mu * (1 - alpha_bar), index)
                gradient += alpha_bar**0.5 / (1 - alpha_bar) * shift
                value = value if rho > 0 else first
        return output.detach(), gradient, value.detach()

    def _factors(self, schedule: str) -> list[float]:
        """A schedule's factor at each step."""
        if schedule == "constant":
            return [1.0] * len(self.timesteps)
        return strengths(schedule, alpha_bars(self.scheduler, self.timesteps))

    def _gradient(self, value: Tensor, x: Tensor, name: str, index: int) -> Tensor:
        """∇ of log f by x."""
        (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        return check_gradient(gradient, name, index, self.timesteps[index])

    def _shift(self, smooth: Callable, xt: Tensor, x0: Tensor, strength: float, index: int) -> tuple[Tensor, Tensor]:
        """Δ_0, and log f̃(x̂_0)."""
        x, first = x0, None
        for _ in range(self.method.iterations):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                value = smooth(xt, x)
                gradient = self._gradient(value, x, "x_0", index)
            first = value if first is None else first
            x = x.detach() + strength * gradient
            if self.method.projection is not None:
                x = check_projected(self.method.projection(x), x, index, self.timesteps[index])
        assert first is not None
        return x - x0, first

    def _smoothed(self, log_prob: Callable, x0: Tensor, alpha_bar: float) -> Callable[[Tensor, Tensor], Tensor]:
        """log f̃, by the same noise wherever it is asked for in this step."""
        method = self.method
        if method.smoothing == 0:
            return log_prob
        std = method.smoothing * (1 - alpha_bar) ** 0.5
        noises = [std * randn_tensor(x0.shape, self.generator, x0.device, x0.dtype) for _ in range(method.samples)]

        def smoothed(xt: Tensor, x0: Tensor) -> Tensor:
            values = torch.stack([log_prob(xt, x0 + noise) for noise in noises])
            return values.logsumexp(dim=0) - math.log(len(noises))

        return smoothed


def strengths(schedule: str, levels: Sequence[float]) -> list[float]:
    """A strength's factor at each step, of mean 1: as α_t ("increase") or 1-α_t ("decrease"), with α_t = ᾱ_t/ᾱ_{t-1}.

    Args:
        schedule: which.
        levels: ᾱ of each step, and of the image after the last, 1.
    """
    alphas = torch.tensor(levels[:-1], dtype=torch.float64) / torch.tensor(levels[1:], dtype=torch.float64)
    factors = alphas if schedule == "increase" else 1 - alphas
    return (factors / factors.mean()).tolist()


def check_method(method: Any, guide: Any, classifier: Any) -> GuidanceMethod:
    """The method of a call, the default where there is none.

    Raises:
        ValueError: for what is none, or options that nothing would read.
    """
    if method is None:
        return GuidanceMethod()
    if not isinstance(method, GuidanceMethod):
        raise ValueError(f"`method` must be a GuidanceMethod, such as GuidanceMethod.freedom(), got {method!r}.")
    reads_x0 = getattr(classifier, "reads_x0", False)
    if classifier is None and guide is None and method != GuidanceMethod():
        raise ValueError("`method` needs a classifier or a `guide`, got neither; leave it out.")
    if classifier is None and method.temperatures != (1.0, 1.0):
        raise ValueError(
            f"`method` changes a classifier's logits, got temperatures of {method.temperatures} without one; leave "
            "these out."
        )
    changed = [name for name in AT_X0 if getattr(method, name) != getattr(GuidanceMethod, name)]
    if changed and guide is None and not reads_x0:
        raise ValueError(
            f"`method` has options at the predicted x_0, {changed}, which nothing reads: got a "
            f"{type(classifier).__name__}; guide by an hfdiff.CleanClassifier, or a `guide`."
        )
    if method.entropy_scale and (classifier is None or reads_x0):
        raise ValueError(
            "`method` scales by the entropy of a classifier of noisy images, got "
            f"{'none' if classifier is None else f'a {type(classifier).__name__}'}; leave `entropy_scale` out."
        )
    if hasattr(classifier, "members") and (method.temperatures != (1.0, 1.0) or method.entropy_scale):
        raise ValueError(
            "`method` changes the logits of one classifier, got temperatures or an entropy scale with several; leave "
            "these out."
        )
    return method
