"""Ways to draw training timesteps other than uniformly. Larger t is noisier."""

import math
from typing import Any

import torch
from torch import Tensor


class LossSecondMomentSampler:
    """Draws t with probability p_t ∝ √E[L_t²], and weights its loss by 1/(T p_t), so that the expected loss stays.

    The bound's terms differ by orders of magnitude over t, which makes its gradient noisy where t is uniform. E[L_t²]
    is the mean over the last `history` losses at t. Until every timestep has as many, t is uniform.

    Reference: Nichol & Dhariwal 2021, equation 18.

    Args:
        num_train_timesteps: T.
        history: losses kept for each timestep.
        uniform_probability: share of the draws that stays uniform, so that no timestep is forgotten.
    """

    def __init__(self, num_train_timesteps: int, history: int = 10, uniform_probability: float = 0.001) -> None:
        self.uniform_probability = uniform_probability
        self.losses = torch.zeros(num_train_timesteps, history, dtype=torch.float64)
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p_t, (T,), float64; sums to 1."""
        count, history = self.losses.shape
        uniform = torch.full((count,), 1 / count, dtype=torch.float64)
        if (self.counts < history).any():
            return uniform
        root = self.losses.square().mean(dim=1).sqrt()
        return torch.lerp(root / root.sum(), uniform, self.uniform_probability)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (count,), and their importance weights 1/(T p_t), (count,), float32."""
        p = self.probabilities()
        timestep = torch.multinomial(p, count, replacement=True, generator=generator)
        return timestep, (1 / (len(p) * p[timestep])).float()

    def update(self, timestep: Tensor, losses: Tensor) -> None:
        """Takes note of unweighted losses (B,) at timesteps (B,); in several processes, of those of all of them.

        Losses that are not finite are left out: the training loop ends a run that has one.
        """
        table, counts = self.losses.numpy(), self.counts.numpy()
        for t, loss in zip(timestep.tolist(), losses.tolist()):
            if math.isfinite(loss):
                table[t, counts[t] % table.shape[1]] = loss
                counts[t] += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


class LogSNRSampler:
    """Draws t so that log SNR is uniform: a mean of squared errors of ε over such t is an integral over log SNR.

    There the error of a gradient counts as many nats at one level as at another (`evaluation.guidance_information`),
    where a uniform t rarely sees the levels of much noise, at which classes are decided.

    Args:
        alphas_cumprod: ᾱ of each timestep, (T,).
        bounds: log SNR at both ends; timesteps outside are drawn by `uniform_probability` alone.
        uniform_probability: share of the draws that stays uniform in t.
    """

    def __init__(
        self, alphas_cumprod: Tensor, bounds: tuple[float, float] = (-7.0, 1.0), uniform_probability: float = 0.1
    ) -> None:
        alpha_bar = alphas_cumprod.double().cpu()
        log_snr = (alpha_bar / (1 - alpha_bar)).log()
        width = -torch.gradient(log_snr.clamp(-50, 50))[0] if len(log_snr) > 1 else torch.ones_like(log_snr)
        inside = width * ((log_snr >= bounds[0]) & (log_snr <= bounds[1]))
        uniform = torch.full_like(width, 1 / len(width))
        self.probabilities = torch.lerp(inside / inside.sum(), uniform, uniform_probability)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, None]:
        """Timesteps (count,), without importance weights: the loss is meant to be another one."""
        return torch.multinomial(self.probabilities, count, replacement=True, generator=generator), None
