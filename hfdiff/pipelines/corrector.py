"""Langevin steps at the level that a sampler's step has reached, towards the density that guidance composes there.

A step aims at what the noisy data become; where several guides are multiplied, their product at each level is another
density, and steps of Langevin dynamics at that level draw from it (Song et al. 2021, section 4.2; Du et al. 2023):

    x' = x + α s(x) + √(2α) z,    s = -ε̂/√(1-ᾱ) + g,    α = r (1-ᾱ)

with r as technique 4 of Song & Ermon (2020) solves it for one step at each of the levels sampled. A step may be
accepted by Metropolis & Hastings: log π(x')/π(x) is the score's integral along the line between them (Sjöberg et al.,
"MCMC-Correction of Score-Based Diffusion Models for Model Composition", 2023), here by the trapezoidal rule, so no
energy is needed.
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .draws import uniform_per_image
from .gaussian import convert
from .guided_sampling import GuidedSampling
from .inputs import check_integer
from .noise import solve_step_size
from .steps import alpha_bars


def check_corrector_steps(
    corrector_steps: Any, corrector_accept: Any, scheduler: Any, num_particles: int, is_masked: bool
) -> None:
    """Refuses a number below 0, and what has no one density at each level.

    Raises:
        ValueError: then.
    """
    check_integer("corrector_steps", corrector_steps, least=0, remedy="0 is off")
    if not corrector_steps:
        if corrector_accept:
            raise ValueError("`corrector_accept` needs `corrector_steps` above 0, got 0; give some, or leave it out.")
        return
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1 or "steps_per_level" in getattr(scheduler, "config", {}):
        raise ValueError(
            f"`corrector_steps` must be 0 for a {name}, got {corrector_steps}; use a scheduler with one model call a "
            "step that does no Langevin steps itself."
        )
    if num_particles > 1 or is_masked:
        other = "`num_particles` above 1" if num_particles > 1 else "a `mask_image`"
        raise ValueError(f"`corrector_steps` must be 0 with {other}, got {corrector_steps}; choose one of them.")


class Corrector:
    """Langevin steps after each step but the last.

    Args:
        sampling: what the networks say.
        timesteps: of the sampling, descending.
        num_steps: Langevin steps at each level.
        accept: by Metropolis & Hastings, for one more evaluation at each level.
        generator: of the images: one for all, or one each.
    """

    def __init__(
        self, sampling: GuidedSampling, timesteps: Tensor, num_steps: int, accept: bool, generator: Any
    ) -> None:
        self.sampling, self.timesteps = sampling, timesteps
        self.num_steps, self.accept, self.generator = num_steps, accept, generator
        levels = alpha_bars(sampling.scheduler, timesteps)[:-1]  # without the image's
        self.alpha_bars = torch.tensor(levels, dtype=torch.float64)
        sigmas = ((1 - self.alpha_bars) / self.alpha_bars) ** 0.5
        self.ratio = solve_step_size(sigmas, 1) / float(sigmas.min()) ** 2

    def __call__(self, latents: Tensor, index: int) -> Tensor:
        """The samples after the steps at the level that step `index` starts from."""
        timestep, alpha_bar = self.timesteps[index], float(self.alpha_bars[index])
        scheduler = self.sampling.scheduler
        scale = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep))
        xt, step_size = latents * scale, self.ratio * (1 - alpha_bar)
        score = self._score(xt, timestep, index, alpha_bar)
        for number in range(self.num_steps):
            noise = randn_tensor(xt.shape, self.generator, xt.device, xt.dtype)
            proposed = xt + step_size * score + (2 * step_size) ** 0.5 * noise
            if not self.accept and number == self.num_steps - 1:
                return proposed / scale
            there = self._score(proposed, timestep, index, alpha_bar)
            if self.accept:
                taken = uniform_per_image(self.generator, len(xt)).to(xt.device).log() < log_acceptance(
                    xt, score, proposed, there, step_size
                )
                chosen = taken.view(-1, *[1] * (xt.ndim - 1))
                proposed, there = torch.where(chosen, proposed, xt), torch.where(chosen, there, score)
            xt, score = proposed, there
        return xt / scale

    def _score(self, xt: Tensor, timestep: Tensor, index: int, alpha_bar: float) -> Tensor:
        """s = -ε̂/√(1-ᾱ) + g."""
        evaluation = self.sampling.evaluate(xt, timestep, index)
        output = evaluation.output[:, : xt.shape[1]]
        score = convert(output, xt, alpha_bar, self.sampling.scheduler.config.prediction_type, "score")
        return score if evaluation.gradient is None else score + evaluation.gradient


def log_acceptance(x: Tensor, score: Tensor, proposed: Tensor, there: Tensor, step_size: float) -> Tensor:
    """log of π(x') q(x | x') / (π(x) q(x' | x)) of a Langevin step x → x', (B,).

    The first ratio by the trapezoidal rule, (x' - x)·(s(x) + s(x'))/2; q(x' | x) = N(x + α s(x), 2α).

    Args:
        x: x, (B, C, H, W).
        score: s(x).
        proposed: x'.
        there: s(x').
        step_size: α.
    """
    step = proposed - x
    density = (step * (score + there)).flatten(1).sum(dim=1) / 2
    forward = (step - step_size * score).square().flatten(1).sum(dim=1)
    backward = (-step - step_size * there).square().flatten(1).sum(dim=1)
    return density + (forward - backward) / (4 * step_size)
