"""What the score networks share beside their layers: their output, and the checks of what they are given.

Level indices are larger where it is noisier: σ_0 = σ_min.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class ScoreOutput(BaseOutput):
    """Output of a score network.

    Args:
        sample: the score ∇ log p_σ(x_t), (B, C, H, W).
    """

    sample: Tensor


def shrink_factor(sample_size: int, widths: Sequence[int], dilations: Sequence[int]) -> int:
    """How many times smaller than the image a network's last map is: levels after the first halve it, if undilated.

    Raises:
        ValueError: for lists of different lengths, numbers out of their range, or a size that is not a multiple.
    """
    if not 0 < len(widths) == len(dilations):
        raise ValueError(
            f"`dilations` must have one entry per entry of `channel_mult`, got {len(dilations)} for {len(widths)}."
        )
    if min(widths) < 2 or min(dilations) < 1:
        raise ValueError(
            "`channel_mult` times `model_channels` must be at least 2 at each level, for a variance over channels, and "
            f"`dilations` at least 1, got {tuple(widths)} and {tuple(dilations)}."
        )
    factor = 2 ** sum(dilation == 1 for dilation in dilations[1:])
    if sample_size % factor:
        raise ValueError(
            f"`sample_size` must be a multiple of {factor}, got {sample_size}; use another size, or fewer levels "
            "with a dilation of 1, each of which halves it."
        )
    return factor


def check_sample(sample: Tensor, channels: int, factor: int) -> None:
    """Refuses a sample of the wrong shape.

    Raises:
        ValueError: when it is not (B, channels, H, W) with H and W multiples of `factor`.
    """
    if sample.ndim != 4 or sample.shape[1] != channels or any(side % factor for side in sample.shape[2:]):
        raise ValueError(
            f"`sample` must be (B, {channels}, H, W) with H and W multiples of {factor}, got {tuple(sample.shape)}."
        )


def level_indices(timestep: Tensor | int, sample: Tensor, num_levels: int) -> Tensor:
    """The indices of the noise levels of a batch.

    Args:
        timestep: t in [0, L): one for all or (B,).
        sample: (B, C, H, W), whose device is taken.
        num_levels: L.

    Returns:
        (B,), integers.

    Raises:
        ValueError: for indices that are not integers, not one per image, or outside [0, L). Those on a GPU are left to
            the look-up itself, as reading them here would wait for it.
    """
    t = torch.as_tensor(timestep)
    if t.is_floating_point() or t.dtype == torch.bool:
        raise ValueError(f"`timestep` must be the integer index of a noise level, got {t.dtype}; pass t, not σ.")
    if t.ndim > 1 or t.numel() not in (1, sample.shape[0]):
        raise ValueError(f"`timestep` must be one index or ({sample.shape[0]},), got the shape {tuple(t.shape)}.")
    if t.device.type == "cpu" and bool(((t < 0) | (t >= num_levels)).any()):
        raise ValueError(f"`timestep` must be in [0, {num_levels}), got {t.tolist()}.")
    return t.to(sample.device, torch.long).expand(sample.shape[0])


def as_levels(sigmas: Sequence[float], num_levels: int) -> Tensor:
    """Noise levels given as numbers, (L,), float64.

    Raises:
        ValueError: when they are not positive and ascending, or not as many as there are levels.
    """
    levels = torch.tensor(sigmas, dtype=torch.float64)
    if len(levels) != num_levels:
        raise ValueError(f"`trained_sigmas` must have `num_levels` = {num_levels} entries, got {len(levels)}.")
    if not (levels > 0).all() or (levels.diff() <= 0).any():
        raise ValueError(
            f"`trained_sigmas` must be positive and ascending, as larger t is noisier, got {list(sigmas)}; sort them."
        )
    return levels
