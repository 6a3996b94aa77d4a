"""Classifiers of noisy images, p(y | x_t, t): the encoder half of the ADM UNet (Dhariwal & Nichol 2021, section 4).

Time runs from clean to noisy: `timestep` 0 is almost clean, `num_train_timesteps - 1` almost pure noise.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .layers import AttentionPool, Blocks, GroupNorm32, check_sizes, embed_time, zero_init

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
SPATIAL_WIDTH = 2048  # hidden width of the spatial pools' two-layer head


@dataclass
class NoisyClassifierOutput(BaseOutput):
    """Output of [`NoisyClassifier`].

    Args:
        logits: (B, num_classes), unnormalised log p(y | x_t, t).
    """

    logits: Tensor


class NoisyClassifier(ModelMixin, ConfigMixin):
    """Time-conditioned classifier log p(y | x_t, t), the encoder half of the ADM UNet with a pooling head.

    Reference: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 4 and appendix I.
    Parameters are named as in guided-diffusion's `EncoderUNetModel`, so its state dicts load as they are.

    Args:
        sample_size: height and width of the images.
        in_channels: C, channels of the images.
        num_classes: K, number of classes.
        model_channels: base width; level i has `channel_mult[i] * model_channels` channels.
        channel_mult: one factor per resolution level; each level after the first halves height and width.
        num_res_blocks: residual blocks per level.
        attention_downsamples: downsampling factors (1, 2, 4, ...) at which attention follows each residual block.
            The middle block always has attention.
        num_heads: attention heads, where `num_head_channels` is not given.
        num_head_channels: channels per attention head; fixes the head count by width.
        use_scale_shift_norm: condition by scale and shift (adaptive group norm) instead of addition.
        resblock_updown: downsample inside a residual block instead of by a strided convolution.
        use_new_attention_order: rows of the qkv projections are [q, k, v][head] instead of [head][q, k, v].
        pool: "attention" (CLIP's pooling), "adaptive" (average), "spatial" or "spatial_v2" (means of every level).
        dropout: dropout probability inside residual blocks.
        norm_num_groups: groups of each group normalisation.
        id2label: name of each class; keys are class indices.
        guidance_scale: w at which it guides best, a pipeline's default.
        noise_schedule: config of the noise the classifier was trained on (`num_train_timesteps`, `beta_schedule`,
            `beta_start`, `beta_end`, `trained_betas`); a pipeline refuses a scheduler with other noise levels.
        timestep_scale: the network sees `timestep_scale * timestep`.

    Raises:
        ValueError: for an unknown pool, sizes that do not divide, or an `id2label` that is not 0..K-1.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        model_channels: int = 32,
        channel_mult: tuple[float, ...] = (1, 2, 2),
        num_res_blocks: int = 1,
        attention_downsamples: tuple[int, ...] = (4,),
        num_heads: int = 1,
        num_head_channels: int | None = 32,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
        pool: str = "attention",
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        id2label: dict[int, str] | None = None,
        noise_schedule: dict[str, Any] | None = None,
        timestep_scale: float = 1.0,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        widths = [int(mult * model_channels) for mult in channel_mult]
        self._check_config(widths)
        self.gradient_checkpointing = False
        make = Blocks(
            4 * model_channels,
            dropout,
            use_scale_shift_norm,
            norm_num_groups,
            num_heads,
            num_head_channels,
            use_new_attention_order,
        )
        self.time_embed = make.time_embed(model_channels)
        self.input_blocks, block_channels = make.encoder(
            in_channels, widths, num_res_blocks, attention_downsamples, resblock_updown
        )
        channels = widths[-1]
        self.middle_block = make.middle(channels)
        side = sample_size // 2 ** (len(widths) - 1)
        self.out = self._make_head(channels, sum(block_channels) + channels, side, make.heads(channels))

    def _check_config(self, widths: list[int]) -> None:
        config = self.config
        if config.pool not in POOLS:
            raise ValueError(f"`pool` must be one of {POOLS}, got {config.pool!r}.")
        check_sizes(config.sample_size, widths, config.norm_num_groups)
        scale = config.guidance_scale
        if scale is not None and not 0 <= scale < math.inf:
            raise ValueError(f"`guidance_scale` must be finite and at least 0, got {scale}.")
        labels = config.id2label
        if labels is not None and sorted(int(key) for key in labels) != list(range(config.num_classes)):
            raise ValueError(
                f"`id2label` must name every class from 0 to {config.num_classes - 1}, got keys {sorted(labels)}."
            )

    def _make_head(self, channels: int, all_channels: int, side: int, num_heads: int) -> nn.Sequential:
        pool, num_classes = self.config.pool, self.config.num_classes
        norm = GroupNorm32(self.config.norm_num_groups, channels)
        if pool == "adaptive":
            return nn.Sequential(
                norm, nn.SiLU(), nn.AdaptiveAvgPool2d(1), zero_init(nn.Conv2d(channels, num_classes, 1))
            )
        if pool == "attention":
            return nn.Sequential(norm, nn.SiLU(), AttentionPool(side, channels, num_heads, num_classes))
        first, last = nn.Linear(all_channels, SPATIAL_WIDTH), nn.Linear(SPATIAL_WIDTH, num_classes)
        if pool == "spatial":
            return nn.Sequential(first, nn.ReLU(), last)
        return nn.Sequential(first, GroupNorm32(32, SPATIAL_WIDTH), nn.SiLU(), last)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class index; the index itself where the config names none."""
        labels = self.config.id2label or {index: str(index) for index in range(self.config.num_classes)}
        return {int(index): str(name) for index, name in labels.items()}

    def _encode(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """The last map (B, C', H', W'), or the concatenated spatial means of all levels for the spatial pools."""
        emb = embed_time(timestep, sample, self.config.model_channels, self.config.timestep_scale)
        emb = self.time_embed(emb.to(self.dtype))
        first, *blocks = self.input_blocks.children()
        (conv_in,) = first.children()
        h = conv_in(sample.to(self.dtype))
        maps = [h]
        for block in [*blocks, self.middle_block]:
            for layer in block.children():
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    h = self._gradient_checkpointing_func(layer, h, emb)
                else:
                    h = layer(h, emb)
            maps.append(h)
        if self.config.pool.startswith("spatial"):
            return torch.cat([h.mean(dim=(2, 3)) for h in maps], dim=-1)
        return h

    def features(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """The vector the last layer classifies, for distances between sets of images.

        Args:
            sample: x_t, (B, C, H, W), clean images in [-1, 1].
            timestep: t, one for all or (B,).

        Returns:
            (B, D): D is the width of the last level, or 2048 for the spatial pools.
        """
        h = self._encode(sample, timestep)
        *layers, last = self.out
        for layer in layers:
            h = layer(h)
        return last.pool(h) if isinstance(last, AttentionPool) else h.flatten(1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, return_dict: bool = True
    ) -> NoisyClassifierOutput | tuple[Tensor]:
        """Classifies noisy images.

        Args:
            sample: x_t, (B, C, H, W), clean images in [-1, 1].
            timestep: t, one for all or (B,).
            return_dict: return a [`NoisyClassifierOutput`] instead of a tuple.

        Returns:
            logits of shape (B, num_classes).
        """
        feature = self.features(sample, timestep)
        last = self.out[-1]
        if isinstance(last, AttentionPool):
            logits = last.project(feature)
        elif isinstance(last, nn.Conv2d):
            logits = last(feature[:, :, None, None]).flatten(1)
        else:
            logits = last(feature)
        return NoisyClassifierOutput(logits=logits) if return_dict else (logits,)
