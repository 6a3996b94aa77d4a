"""The terms of the variational bound on -log p(x_0) (Ho et al. 2020, equation 5). Larger t is noisier."""

import copy
import math

import torch
from torch import Tensor

from .gaussian import discretized_gaussian_log_likelihood, normal_kl
from .scheduling_ddpm import DDPMScheduler, PMeanVariance


def variational_terms(p: PMeanVariance, scheduler: DDPMScheduler, x0: Tensor, xt: Tensor, timestep: Tensor) -> Tensor:
    """The bound's term at each image's timestep, in bits per dimension, (B,) (Ho et al. 2020, equation 5).

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at the chain's first timestep L_0 = -log p(x_0 | x_1),
    of 8-bit images ([`~hfdiff.schedulers.gaussian.discretized_gaussian_log_likelihood`]).

    Args:
        p: p(x_{t-1} | x_t), from the scheduler's `p_mean_variance`.
        scheduler: the chain.
        x0: clean images.
        xt: noisy images x_t.
        timestep: t, of the chain.
    """
    mean, _, log_variance = scheduler.q_posterior(x0, xt, timestep)
    kl = normal_kl(mean, log_variance, p.mean, p.log_variance)
    nll = -discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    first = int(scheduler.timesteps[-1])
    nats = torch.where(timestep == first, nll.flatten(1).mean(dim=1), kl.flatten(1).mean(dim=1))
    return nats / math.log(2)


def clipped(scheduler: DDPMScheduler, clip: bool) -> DDPMScheduler:
    """The scheduler with its chain, but with predictions of x_0 clipped to [-1, 1], or left alone."""
    other = copy.copy(scheduler)
    other.register_to_config(clip_sample=clip, clip_sample_range=1.0, thresholding=False)
    return other
