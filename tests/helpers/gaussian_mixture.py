"""A Gaussian mixture diffused by DDPM: its score, classifier and conditional moments in closed form.

x_0 ~ Σ_k π_k N(m_k, s_k² I) and x_t = √ᾱ x_0 + √(1-ᾱ) ε give x_t ~ Σ_k π_k N(√ᾱ m_k, (ᾱ s_k² + 1 - ᾱ) I).
"""

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class Mixture:
    """Components on the pixels of a (1, 1, D) image; `classes` groups them into labels."""

    weights = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.5], [0.8, 1.0], [0.5, -0.7]], dtype=torch.float64)
    scales = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
    classes = torch.tensor([0, 0, 1])

    def __init__(self, alpha_bar: Tensor):
        self.alpha_bar = alpha_bar.double()

    def alpha_bar_at(self, timestep: Tensor) -> Tensor:
        """ᾱ at a timestep; between two, σ = √((1-ᾱ)/ᾱ) is interpolated linearly, as the Euler schedulers do."""
        timestep = torch.as_tensor(timestep)
        if not timestep.is_floating_point():
            return self.alpha_bar[timestep]
        sigmas = ((1 - self.alpha_bar) / self.alpha_bar) ** 0.5
        low = timestep.floor().long()
        high = (low + 1).clamp(max=len(sigmas) - 1)
        return 1 / (1 + torch.lerp(sigmas[low], sigmas[high], (timestep - low).double()) ** 2)

    def component_log_probs(self, xt: Tensor, timestep: Tensor) -> Tensor:
        """log π_k N(x_t; ...), (B, K), held as (K, B): sums over few components are then fast."""
        alpha_bar = self.alpha_bar_at(timestep).reshape(1, -1)
        weights, means, scales = self.weights[:, None], self.means[..., None], self.scales[:, None]
        variance = alpha_bar * scales**2 + 1 - alpha_bar
        pixels = xt.flatten(1).unbind(dim=1)
        distance = sum((x - alpha_bar**0.5 * means[:, i]) ** 2 for i, x in enumerate(pixels))
        return (weights.log() - distance / (2 * variance) - len(pixels) / 2 * variance.log()).T

    def class_log_probs(self, xt: Tensor, timestep: Tensor) -> Tensor:
        """log p(x_t, y), (B, number of classes)."""
        parts = self.component_log_probs(xt, timestep)
        labels = range(int(self.classes.max()) + 1)
        return torch.stack([parts[:, self.classes == label].logsumexp(-1) for label in labels], dim=-1)

    def score(self, xt: Tensor, timestep: Tensor) -> Tensor:
        """∇ log p(x_t), of the shape of x_t: each component's pull (√ᾱ m_k - x_t) / variance by its probability."""
        alpha_bar = self.alpha_bar_at(timestep).reshape(-1, 1)
        variance = alpha_bar * self.scales**2 + 1 - alpha_bar
        parts = self.component_log_probs(xt, timestep)
        pull = (parts - parts.logsumexp(-1, keepdim=True)).exp() / variance
        return (alpha_bar**0.5 * (pull @ self.means) - pull.sum(-1, keepdim=True) * xt.flatten(1)).view_as(xt)

    def posterior_mean(self, xt: Tensor, timestep: Tensor, label: int | None = None) -> Tensor:
        """E[x_0 | x_t], or E[x_0 | x_t, y], (B, D), from each component's conjugate posterior."""
        alpha_bar = self.alpha_bar_at(timestep).reshape(-1, 1, 1)
        variance = (self.scales**2)[:, None]
        gain = alpha_bar**0.5 * variance / (alpha_bar * variance + 1 - alpha_bar)
        means = self.means + gain * (xt.flatten(1)[:, None] - alpha_bar**0.5 * self.means)
        parts = self.component_log_probs(xt, timestep)
        if label is not None:
            parts = parts.masked_fill(self.classes != label, -torch.inf)
        return (parts.softmax(-1)[..., None] * means).sum(1)

    def conditional_moments(self, label: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of p(x_0 | y)."""
        chosen = self.classes == label
        weights = self.weights[chosen] / self.weights[chosen].sum()
        means, scales = self.means[chosen], self.scales[chosen]
        mean = weights @ means
        spread = (means - mean).T @ (weights[:, None] * (means - mean))
        return mean, spread + (weights @ scales**2) * torch.eye(len(mean), dtype=torch.float64)


class ExactModel(ModelMixin, ConfigMixin):
    """The mixture's exact prediction of ε, x_0 or v."""

    @register_to_config
    def __init__(self, prediction_type: str = "epsilon", sample_size: tuple = (1, 2), in_channels: int = 1):
        super().__init__()
        self.register_buffer("reference", torch.zeros((), dtype=torch.float64))

    def attach(self, mixture: Mixture) -> "ExactModel":
        self.mixture, self.calls = mixture, 0
        return self

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        self.calls += 1
        alpha_bar = self.mixture.alpha_bar_at(timestep).reshape(-1, 1, 1, 1)
        eps = -((1 - alpha_bar) ** 0.5) * self.mixture.score(sample, timestep)
        x0 = (sample - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        v = alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x0
        return SimpleNamespace(sample={"epsilon": eps, "sample": x0, "v_prediction": v}[self.config.prediction_type])


class ExactClassifier(ModelMixin, ConfigMixin):
    """The mixture's exact log p(y | x_t), as logits."""

    @register_to_config
    def __init__(self, num_classes: int = 2, id2label: dict | None = None, noise_schedule: dict | None = None):
        super().__init__()
        self.register_buffer("reference", torch.zeros((), dtype=torch.float64))

    def attach(self, mixture: Mixture) -> "ExactClassifier":
        self.mixture, self.calls = mixture, 0
        return self

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=self.mixture.class_log_probs(sample, timestep))
