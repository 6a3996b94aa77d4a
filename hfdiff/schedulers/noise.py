"""Noise levels as pure functions: β schedules, the respacing of a chain, σ schedules. Larger t is noisier; float64.

A β schedule is a vector β_0..β_{T-1}; α_t = 1 - β_t and ᾱ_t = ∏_{s≤t} α_s (Ho et al. 2020, section 2). A σ schedule is
the standard deviations σ_0 < ... < σ_{L-1} of x_t = x_0 + σ_t ε (Song & Ermon 2019).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MAX_BETA = 0.999  # the cap of Nichol & Dhariwal (2021), section 3.2
BISECTIONS = 100  # to the last bit of a float64


def _between(num_train_timesteps: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, num_train_timesteps, dtype=torch.float64)


def _warmup(num_train_timesteps: int, start: float, end: float, fraction: float) -> Tensor:
    betas = torch.full((num_train_timesteps,), end, dtype=torch.float64)
    ramp = int(num_train_timesteps * fraction)
    betas[:ramp] = _between(ramp, start, end)
    return betas


def _quadratic(num_train_timesteps: int, start: float, end: float) -> Tensor:
    return _between(num_train_timesteps, start**0.5, end**0.5) ** 2


def betas_from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], num_train_timesteps: int) -> Tensor:
    """Betas whose running product of 1-β follows a function of the fraction of time in [0, 1], capped at 0.999."""
    values = alpha_bar(_between(num_train_timesteps + 1, 0.0, 1.0))
    return (1 - values[1:] / values[:-1]).clamp(max=MAX_BETA)


def _cosine_alpha_bar(progress: Tensor) -> Tensor:
    return torch.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(progress: Tensor) -> Tensor:
    distance = 0.5 - progress
    snr = torch.exp(
        -0.5 * torch.copysign(torch.ones_like(distance), distance) * torch.log(1 - 2 * distance.abs() + 1e-6)
    )
    return torch.sqrt(snr / (1 + snr))


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _between,
    "scaled_linear": _quadratic,  # latent diffusion's name of Ho et al.'s "quad"
    "quad": _quadratic,
    "const": lambda count, start, end: torch.full((count,), end, dtype=torch.float64),
    "jsd": lambda count, start, end: 1.0 / _between(count, count, 1.0),
    "warmup10": lambda count, start, end: _warmup(count, start, end, 0.1),
    "warmup50": lambda count, start, end: _warmup(count, start, end, 0.5),
    "squaredcos_cap_v2": lambda count, start, end: betas_from_alpha_bar(_cosine_alpha_bar, count),
    "laplace": lambda count, start, end: betas_from_alpha_bar(_laplace_alpha_bar, count),
    "sigmoid": lambda count, start, end: torch.sigmoid(_between(count, -6.0, 6.0)) * (end - start) + start,
}


def make_betas(schedule: str, num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """The variances β_t of a named schedule.

    linear, quad, const, jsd, warmup10 and warmup50 are those of Ho et al. (2020); squaredcos_cap_v2 is the cosine
    schedule of Nichol & Dhariwal (2021), equation 17; scaled_linear, sigmoid and laplace are diffusers'.
    `beta_start` and `beta_end` are taken as given: guided-diffusion scales both by 1000/T for its linear schedule.

    Args:
        schedule: one of `BETA_SCHEDULES`.
        num_train_timesteps: T.
        beta_start: β_0, in (0, 1).
        beta_end: β_{T-1}, in (0, 1).

    Returns:
        (T,), float64, values in (0, 1].

    Raises:
        ValueError: for an unknown schedule, or fewer than one timestep.
    """
    if schedule not in BETA_SCHEDULES:
        raise ValueError(
            f"`beta_schedule` must be one of {sorted(BETA_SCHEDULES)}, got {schedule!r}; "
            "for other betas give them as `trained_betas`."
        )
    if num_train_timesteps < 1:
        raise ValueError(f"`num_train_timesteps` must be at least 1, got {num_train_timesteps}.")
    return BETA_SCHEDULES[schedule](num_train_timesteps, beta_start, beta_end)


def betas_of(
    trained_betas: Sequence[float] | None, schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float
) -> Tensor:
    """The betas of a scheduler's config, (T,), float64: those trained with, where it has them, else the named ones."""
    if trained_betas is not None:
        return checked_betas("trained_betas", torch.as_tensor(trained_betas, dtype=torch.float64))
    return checked_betas("beta_start` and `beta_end", make_betas(schedule, num_train_timesteps, beta_start, beta_end))


def checked_betas(name: str, betas: Tensor) -> Tensor:
    """The betas, if they are variances of steps: in (0, 1), or 1 at the last, whose ᾱ is then 0.

    Raises:
        ValueError: for others.
    """
    wrong = ~((betas > 0) & (betas < 1))
    wrong[-1:] &= betas[-1:] != 1
    if betas.ndim != 1 or not len(betas) or wrong.any():
        t = int(wrong.flatten().nonzero()[0]) if wrong.any() else 0
        came = f"β_{t} = {betas.flatten()[t]:g}" if betas.numel() else "none"
        raise ValueError(
            f"`{name}` must give betas between 0 and 1, of which only the last may be 1, got {came}; change them."
        )
    return betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shifts and scales √ᾱ so that ᾱ_{T-1} = 0 and ᾱ_0 stays (Lin et al. 2024, algorithm 1). (T,) to (T,)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    first, last = root[0], root[-1]
    alpha_bar = ((root - last) * first / (first - last)) ** 2
    previous = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    return 1 - alpha_bar / previous


def _ddim_timesteps(num_train_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_train_timesteps + 1):
        if len(steps := range(0, num_train_timesteps, stride)) == count:
            return list(steps)
    raise ValueError(
        f'`respacing` "ddim{count}" needs an integer stride that takes exactly {count} of {num_train_timesteps} '
        f'timesteps, and there is none; use "{count}" or another count.'
    )


def space_timesteps(num_train_timesteps: int, spec: str | Sequence[int]) -> list[int]:
    """Timesteps to keep of a chain of T, by guided-diffusion's rule (Nichol & Dhariwal 2021, section 4).

    The chain is cut into equal sections, one per count; each section's timesteps are spread evenly from its first to
    its last and rounded half to even.

    Args:
        num_train_timesteps: T.
        spec: "250", "10,15,20" (a count per section), the counts themselves, or "ddim25" (a fixed integer stride).

    Returns:
        Timesteps, ascending, in [0, T).

    Raises:
        ValueError: when `spec` cannot be read, a section is shorter than its count, or no stride fits.
    """
    try:
        if isinstance(spec, str) and spec.startswith("ddim"):
            return _ddim_timesteps(num_train_timesteps, int(spec.removeprefix("ddim")))
        counts = [int(count) for count in (spec.split(",") if isinstance(spec, str) else spec)]
    except (TypeError, ValueError) as error:
        if "stride" in str(error):
            raise
        raise ValueError(f'`respacing` must be like "250", "10,15,20" or "ddim25", got {spec!r}.') from error
    size, extra = divmod(num_train_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 0 <= count <= length:
            raise ValueError(
                f"`respacing` {spec!r} asks for {count} timesteps of a section of {length}; "
                f"each of the {len(counts)} sections of {num_train_timesteps} timesteps can give 0 to {length}."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # accumulated, not multiplied: the rounding of guided-diffusion depends on it
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


# --- σ schedules of score networks -----------------------------------------------------------------------------------


def geometric_sigmas(sigma_min: float, sigma_max: float, num_levels: int) -> Tensor:
    """Noise levels σ_0 = σ_min < ... < σ_{L-1} = σ_max with a constant ratio (Song & Ermon 2019, section 4.2).

    Args:
        sigma_min: the smallest standard deviation, in data units.
        sigma_max: the largest.
        num_levels: L.

    Returns:
        (L,), float64, ascending.

    Raises:
        ValueError: when not 0 < σ_min < σ_max, or L < 2.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"`sigma_min` and `sigma_max` must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}; "
            "swap or change them."
        )
    if num_levels < 2:
        raise ValueError(f"`num_levels` must be at least 2, one for each end, got {num_levels}.")
    return torch.exp(_between(num_levels, math.log(sigma_min), math.log(sigma_max)))


def ncsnv2_num_levels(sigma_min: float, sigma_max: float, dim: int) -> int:
    """How many levels keep each within reach of the next (Song & Ermon 2020, technique 2).

    In D dimensions the images of level σ lie near a sphere of radius √D σ, of which Langevin dynamics at the level
    below, γ times smaller, must see enough: Φ(√(2D) (γ - 1) + 3γ) - Φ(√(2D) (γ - 1) - 3γ) ≈ 0.5.

    Args:
        sigma_min: the smallest standard deviation.
        sigma_max: the largest.
        dim: D, elements of an image.

    Returns:
        L of the geometric schedule with that γ, rounded up.
    """
    geometric_sigmas(sigma_min, sigma_max, 2)  # checks the ends

    def overlap(ratio: float) -> float:
        centre, width = math.sqrt(2 * dim) * (ratio - 1), 3 * ratio
        return 0.5 * (math.erf((centre + width) / math.sqrt(2)) - math.erf((centre - width) / math.sqrt(2)))

    low, high = 1.0, 8.0  # the overlap falls from 0.997 to under 0.5 for any D
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle) > 0.5 else (low, middle)
    return max(2, 1 + math.ceil(math.log(sigma_max / sigma_min) / math.log(low)))


def solve_step_size(sigmas: Tensor, steps_per_level: int) -> float:
    """The step size that leaves the variance of each level closest to its σ² (Song & Ermon 2020, technique 4).

    T steps of Langevin dynamics with r = step_size/σ_min² on N(0, σ²), from the level before, γ times larger, end at
    the variance ((1-r)^{2T} (γ² - v) + v) σ² with v = 2/(2-r); r minimises its distance from σ².

    Args:
        sigmas: the levels sampled, ascending or descending, (L,); γ is their mean ratio.
        steps_per_level: T.

    Returns:
        α at the smallest level, r σ_min².
    """
    smallest, largest = float(sigmas.min()), float(sigmas.max())
    ratio = (largest / smallest) ** (1 / max(1, len(sigmas) - 1))

    def excess(r: float) -> float:
        stationary = 2 / (2 - r)
        return (1 - r) ** (2 * steps_per_level) * (ratio**2 - stationary) + stationary

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):  # thirds: the excess falls, then rises
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if excess(first) < excess(second) else (first, high)
    return (low + high) / 2 * smallest**2
