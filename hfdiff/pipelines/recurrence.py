"""Recurrence: a step is taken several times, with noise back to x_t in between.

Lugmayr et al., "RePaint", 2022, section 4.2; as time travel in Yu et al., "FreeDoM", 2023, and as self-recurrence in
Bansal et al., "Universal Guidance for Diffusion Models", 2023. The noise brings x_{t-1} back to what x_t is distributed
like, so what guidance has moved and the model has not yet made likely, it makes likely in the next round. A multistep
solver takes the noise between its rounds for curvature, so it needs more steps than one that remembers none.
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .guided_sampling import GuidedSampling
from .steps import alpha_bars, kept_state


class Recurrence:
    """The rounds of each guided step before the last.

    Args:
        sampling: what the networks say.
        timesteps: descending.
        times: how often each step is taken.
        generator: of the images: one for all, or one each.
    """

    def __init__(self, sampling: GuidedSampling, timesteps: Tensor, times: int, generator: Any) -> None:
        self.sampling, self.timesteps, self.times, self.generator = sampling, timesteps, times, generator
        self.alpha_bars = alpha_bars(sampling.scheduler, timesteps)

    def __call__(self, latents: Tensor, index: int) -> Tensor:
        """The samples at the level that step `index` starts from, after so many rounds but one."""
        if not self.sampling.is_guided(index):
            return latents
        timestep, scheduler = self.timesteps[index], self.sampling.scheduler
        for _ in range(self.times - 1):
            with kept_state(scheduler):
                xt = scheduler.scale_model_input(latents, timestep)
                evaluation = self.sampling.evaluate(xt, timestep, index)
                step, _ = self.sampling.reverse(evaluation.output, evaluation.gradient, latents, xt, timestep, index)
                scale = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep))
            latents = self._noised(step.prev_sample, index, scaled=scale != 1)
        return latents

    def _noised(self, latents: Tensor, index: int, scaled: bool) -> Tensor:
        """q(x_t | x_{t-1}); in units of x_0 + σ ε where the scheduler scales what the model is given."""
        noise = randn_tensor(latents.shape, self.generator, latents.device, latents.dtype)
        here, there = self.alpha_bars[index], self.alpha_bars[index + 1]
        if scaled:
            return latents + (1 / here - 1 / there) ** 0.5 * noise
        return (here / there) ** 0.5 * latents + (1 - here / there) ** 0.5 * noise


def check_recurrence(recurrence: int, scheduler: Any, num_particles: int) -> None:
    """Refuses to take steps of several calls, or of particles, again.

    Raises:
        ValueError: then.
    """
    if recurrence == 1:
        return
    if getattr(scheduler, "order", 1) != 1 or "steps_per_level" in getattr(scheduler, "config", {}):
        raise ValueError(
            f"`method` must have a recurrence of 1 for a {type(scheduler).__name__}, got {recurrence}; use a scheduler "
            "with one model call a step that does not repeat levels itself."
        )
    if num_particles > 1:
        raise ValueError(
            f"`method` must have a recurrence of 1 with `num_particles` above 1, got {recurrence} with "
            f"{num_particles}; choose one of them."
        )
