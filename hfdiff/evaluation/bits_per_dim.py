"""The variational bound on the negative log-likelihood, in bits per dimension (Ho et al. 2020, equations 3 to 5).

-log₂ p(x_0) ≤ L_T + Σ_{t>1} L_{t-1} + L_0, divided by the number of elements of an image. Larger t is noisier; results
are in ascending order, from the cleanest timestep, whose term is L_0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..schedulers.gaussian import normal_kl
from ..schedulers.scheduling_ddpm import DDPMScheduler
from ..schedulers.variational_bound import clipped, variational_terms

Noise = Tensor | Callable[[int], Tensor]


class BitsPerDim(NamedTuple):
    """The bound of a set of N images and its terms, means over images, on the CPU.

    Args:
        total: the bound, a scalar, bits per dimension: `prior` and the sum of the chain's terms.
        prior: L_T = KL(q(x_T | x_0) || N(0, I)), a scalar, bits per dimension.
        vb: the terms, (T,), bits per dimension, in the order of `timesteps`: L_0 first, then L_1, L_2, ...
        mse: mean squared error of the noise ε̂ that belongs to the prediction of x_0, (T,).
        x0_mse: mean squared error of the prediction of x_0, (T,).
        timesteps: the timesteps of the terms, ascending, (T,).
        per_image: the bound of each image, (N,), whose mean is `total`.
    """

    total: Tensor
    prior: Tensor
    vb: Tensor
    mse: Tensor
    x0_mse: Tensor
    timesteps: Tensor
    per_image: Tensor


@torch.no_grad()
def bits_per_dim(
    unet: Callable[..., Any],
    scheduler: DDPMScheduler,
    x0: Tensor,
    *,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    timesteps: Sequence[int] | None = None,
    clip_denoised: bool = True,
    class_labels: Tensor | None = None,
    batch_size: int = 256,
) -> BitsPerDim:
    """The variational bound of images under a diffusion model, one noise draw for each image and timestep.

    Unless `noise` is given, it is drawn as guided-diffusion's `calc_bpd_loop` draws it: standard normal of all images'
    shape, timestep after timestep from the noisiest. The scheduler's chain is the model's: the trained one, or after
    `set_timesteps` the respaced one, whose bound is another. The model should be in evaluation mode.

    Args:
        unet: any diffusers UNet, in the scheduler's `prediction_type`, with the channels of a learned variance.
        scheduler: the chain; a scheduler of diffusers is converted by `DDPMScheduler.from_config(other.config)`.
        x0: images of 8-bit levels in [-1, 1], (N, C, H, W).
        noise: ε for each timestep, (T, N, C, H, W) in ascending order, or a function of the timestep.
        generator: source of the noise otherwise.
        timesteps: compute only these terms, for speed; the others are interpolated linearly in `total` and `per_image`.
            The chain's first two and last must be among them ([`spread_timesteps`] chooses some).
        clip_denoised: clip predictions of x_0 to [-1, 1].
        class_labels: y, (N,), for a class-conditional UNet.
        batch_size: images per model call.

    Raises:
        ValueError: for another scheduler, images outside [-1, 1] where predictions are clipped, or noise or timesteps
            that do not fit the chain.
    """
    chain = _check(scheduler, x0, clip_denoised)
    terms = sorted(chain if timesteps is None else map(int, timesteps))
    sums = _interpolation_sums(chain, terms)
    draw = _noise_source(noise, terms, x0, generator)
    scheduler = clipped(scheduler, clip_denoised)
    prior = _prior(scheduler, x0)
    per_image = prior.double()  # sums of many terms
    rows = {}
    for t in reversed(terms):
        eps = draw(t)
        parts = [
            _term(unet, scheduler, t, x0[part], eps[part], None if class_labels is None else class_labels[part])
            for part in (slice(start, start + batch_size) for start in range(0, len(x0), batch_size))
        ]
        vb, *errors = (torch.cat(column) for column in zip(*parts))
        per_image = per_image + sums[t] * vb
        rows[t] = torch.stack([vb.mean(), *(error.mean() for error in errors)])
    vb, mse, x0_mse = torch.stack([rows[t] for t in terms], dim=1)
    per_image = per_image.to(prior)
    return BitsPerDim(per_image.mean(), prior.mean(), vb, mse, x0_mse, torch.tensor(terms), per_image)


def spread_timesteps(scheduler: DDPMScheduler, count: int) -> list[int]:
    """About `count` timesteps of the chain to compute the bound from, spread geometrically: terms fall steeply in t.

    Raises:
        ValueError: for a count under 3.
    """
    if count < 3:
        raise ValueError(f"`count` must be at least 3, the chain's first two timesteps and its last, got {count}.")
    chain = scheduler.timesteps.tolist()[::-1]
    positions = np.geomspace(1, max(1, len(chain) - 1), count - 1).round().astype(int)
    return sorted({chain[0], *(chain[min(position, len(chain) - 1)] for position in positions)})


def _term(
    unet: Callable[..., Any], scheduler: DDPMScheduler, t: int, x0: Tensor, noise: Tensor, class_labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The bound's term and the squared errors of ε and x_0 for a batch at one timestep, each (B,), on the CPU."""
    device, dtype = getattr(unet, "device", x0.device), getattr(unet, "dtype", x0.dtype)
    x0, noise = x0.to(device), noise.to(device)
    timestep = torch.full((len(x0),), t, device=device)
    xt = scheduler.q_sample(x0, timestep, noise)
    condition = {} if class_labels is None else {"class_labels": class_labels.to(device)}
    output = unet(xt.to(dtype), timestep, **condition).sample.to(x0.dtype)
    p = scheduler.p_mean_variance(output, timestep, xt)
    alpha_bar = float(scheduler.alphas_cumprod[t])
    eps = (xt - alpha_bar**0.5 * p.pred_original_sample) / (1 - alpha_bar) ** 0.5  # defined at ᾱ = 0, too
    mse, x0_mse = ((a - b).square().flatten(1).mean(dim=1) for a, b in ((eps, noise), (p.pred_original_sample, x0)))
    return variational_terms(p, scheduler, x0, xt, timestep).cpu(), mse.cpu(), x0_mse.cpu()


def _prior(scheduler: DDPMScheduler, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) of each image, in bits per dimension, (N,), on the CPU."""
    alpha_bar = scheduler.alphas_cumprod[int(scheduler.timesteps[0])]
    zero = torch.zeros((), dtype=torch.float64)
    kl = normal_kl(alpha_bar.sqrt() * x0.cpu(), torch.log1p(-alpha_bar), zero, zero)
    return kl.flatten(1).mean(dim=1) / math.log(2)


def _check(scheduler: DDPMScheduler, x0: Tensor, clip_denoised: bool) -> list[int]:
    """The chain, ascending, of a scheduler and images that a bound can be computed for."""
    if not isinstance(scheduler, DDPMScheduler):
        raise ValueError(
            f"`scheduler` must be an hfdiff.DDPMScheduler, got {type(scheduler).__name__}; convert it with "
            "`DDPMScheduler.from_config(scheduler.config)`."
        )
    if x0.ndim != 4 or not len(x0) or not x0.is_floating_point():
        raise ValueError(f"`x0` must be float images (N, C, H, W), got {tuple(x0.shape)} of {x0.dtype}.")
    if clip_denoised and x0.abs().max() > 1:
        raise ValueError(
            f"`x0` must be in [-1, 1], to which `clip_denoised` clips predictions, got {x0.min():g} to {x0.max():g}; "
            "scale bytes by `images / 127.5 - 1`."
        )
    return scheduler.timesteps.tolist()[::-1]


def _noise_source(
    noise: Noise | None, terms: list[int], x0: Tensor, generator: torch.Generator | None
) -> Callable[[int], Tensor]:
    """A function from a timestep to its noise (N, C, H, W)."""
    if noise is None:
        return lambda t: randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    if isinstance(noise, Tensor):
        expected = (len(terms), *x0.shape)
        if noise.shape != expected:
            raise ValueError(
                f"`noise` must have shape {expected}, one draw per timestep from the cleanest on, got "
                f"{tuple(noise.shape)}; or give a function of the timestep."
            )
        return dict(zip(terms, noise)).__getitem__
    return noise


def _interpolation_sums(chain: list[int], terms: list[int]) -> dict[int, float]:
    """The weight of each computed term in the chain's sum, the terms between interpolated linearly; 1 if all are."""
    needed = {*chain[:2], chain[-1]}
    if not needed <= set(terms) <= set(chain) or len(set(terms)) < len(terms):
        raise ValueError(
            f"`timesteps` must be different timesteps of the scheduler's chain of {len(chain)} with {sorted(needed)} "
            f"among them, got {terms}; add or remove what differs."
        )
    weights = [np.interp(chain, terms, row).sum() for row in np.eye(len(terms))]
    return dict(zip(terms, weights))
