"""Building blocks of the ADM networks (Dhariwal & Nichol 2021, appendix A): residual block, attention, pooling.

Parameter names and shapes are those of OpenAI's guided-diffusion, so its state dicts load as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with its statistics in float32 at least, returned in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        out = F.group_norm(input.to(dtype), self.num_groups, self.weight.to(dtype), self.bias.to(dtype), self.eps)
        return out.to(input.dtype)


def embed_time(timestep: Tensor | float | int, sample: Tensor, width: int, scale: float = 1.0) -> Tensor:
    """Sinusoids of `scale` times the timestep, one for all of the sample's batch or (B,), as (B, width) in float32."""
    timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
    return get_timestep_embedding(timestep * scale, width, flip_sin_to_cos=True, downscale_freq_shift=0)


def zero_init(module: Layer) -> Layer:
    """Sets a module's parameters to zero, so that the branch it ends starts as the zero function."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def split_heads(qkv: Tensor, num_heads: int, new_attention_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Splits (B, L, 3·C) into three (B, heads, L, C/heads).

    Channels are stored as [head][q, k, v], or as [q, k, v][head] in the new order; the wrong order raises no error.
    """
    if new_attention_order:
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    else:
        q, k, v = qkv.unflatten(-1, (num_heads, 3, -1)).unbind(3)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def project(layer: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A convolution of width 1 on (B, L, C): with channels last, attention runs in fused kernels.

    The layer itself is not called, so weights stored in fewer bits are converted here.
    """
    weight, bias = layer.weight[:, :, 0], layer.bias
    return F.linear(tokens, weight.to(tokens.dtype), None if bias is None else bias.to(tokens.dtype))


class AttentionBlock(nn.Module):
    """Residual multi-head self-attention over the positions of a (B, C, H, W) map."""

    def __init__(
        self, channels: int, num_heads: int, norm_num_groups: int = 32, new_attention_order: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.new_attention_order = new_attention_order
        self.norm = GroupNorm32(norm_num_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape; `emb` is taken for the residual block's signature, and unused."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = split_heads(project(self.qkv, tokens), self.num_heads, self.new_attention_order)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + project(self.proj_out, h).transpose(1, 2).unflatten(2, x.shape[2:])


class AttentionPool(nn.Module):
    """Pools a map by attention from its mean, as CLIP does (Radford et al. 2021): one query, the mean token.

    `pool` gives the (B, C) feature, `forward` projects it to (B, out_channels).
    """

    def __init__(self, side: int, channels: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def pool(self, x: Tensor) -> Tensor:
        """Maps (B, C, side, side) to (B, C)."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positional_embedding.to(x.dtype).T
        q, k, v = split_heads(project(self.qkv_proj, tokens), self.num_heads, new_attention_order=True)
        return F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1)

    def project(self, feature: Tensor) -> Tensor:
        """Maps (B, C) to (B, out_channels)."""
        return project(self.c_proj, feature)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.pool(x))


class Downsample(nn.Module):
    """Halves height and width with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps (B, C, H, W) to half the size; `emb` is taken for the residual block's signature, and unused."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps (B, C, H, W) to twice the size; `emb` is taken for the residual block's signature, and unused."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions around a time embedding, with a skip connection.

    Args:
        channels: channels of the input.
        emb_channels: length of the time embedding.
        out_channels: channels of the output.
        dropout: probability before the last convolution.
        scale_shift: the embedding scales and shifts the second normalisation (adaptive group norm) instead of being
            added to its input.
        down: halve height and width, by average pooling inside the block.
        up: double height and width, by repeating pixels inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        scale_shift: bool = True,
        down: bool = False,
        up: bool = False,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = nn.AvgPool2d(2) if down else nn.Upsample(scale_factor=2.0) if up else nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm32(norm_num_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(norm_num_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps (B, channels, H, W) and (B, emb_channels) to (B, out_channels, H, W), resized by `down` or `up`."""
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        condition = self.emb_layers(emb)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + condition)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


@dataclass(frozen=True)
class Blocks:
    """Makes the blocks of one network, which share these settings.

    Args:
        emb_channels: length of the time embedding.
        dropout: probability before the last convolution of a residual block.
        scale_shift: as in [`ResBlock`].
        norm_num_groups: groups of each group normalisation.
        num_heads: attention heads, where `num_head_channels` is None.
        num_head_channels: channels per attention head; fixes the head count by width.
        new_attention_order: as in [`split_heads`].
    """

    emb_channels: int
    dropout: float
    scale_shift: bool
    norm_num_groups: int
    num_heads: int
    num_head_channels: int | None
    new_attention_order: bool

    def time_embed(self, channels: int) -> nn.Sequential:
        """The layers from a sinusoidal embedding of time, (B, channels), to (B, emb_channels)."""
        width = self.emb_channels
        return nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def heads(self, channels: int) -> int:
        """How many attention heads a map has.

        Raises:
            ValueError: when the channels cannot be divided among them.
        """
        if self.num_head_channels is None:
            name, divisor = "num_heads", self.num_heads
        else:
            name, divisor = "num_head_channels", self.num_head_channels
        if divisor < 1 or channels % divisor:
            raise ValueError(
                f"`{name}` must divide the {channels} channels of each map with attention, got {divisor}; choose a "
                "divisor."
            )
        return divisor if name == "num_heads" else channels // divisor

    def res_block(self, channels: int, out_channels: int, *, down: bool = False, up: bool = False) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            out_channels,
            dropout=self.dropout,
            scale_shift=self.scale_shift,
            down=down,
            up=up,
            norm_num_groups=self.norm_num_groups,
        )

    def attention(self, channels: int) -> AttentionBlock:
        return AttentionBlock(channels, self.heads(channels), self.norm_num_groups, self.new_attention_order)

    def encoder(
        self,
        in_channels: int,
        widths: Sequence[int],
        num_res_blocks: int,
        attention_downsamples: Sequence[int],
        resblock_updown: bool,
    ) -> tuple[nn.ModuleList, list[int]]:
        """The blocks from the images to the lowest resolution, and the channels after each.

        The first block is one convolution, the others are lists of layers of (x, emb).
        """
        channels = widths[0]
        blocks = [nn.ModuleList([nn.Conv2d(in_channels, channels, 3, padding=1)])]
        block_channels = [channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [self.res_block(channels, width)]
                channels = width
                if 2**level in attention_downsamples:
                    layers.append(self.attention(channels))
                blocks.append(nn.ModuleList(layers))
                block_channels.append(channels)
            if level < len(widths) - 1:
                down = self.res_block(channels, channels, down=True) if resblock_updown else Downsample(channels)
                blocks.append(nn.ModuleList([down]))
                block_channels.append(channels)
        return nn.ModuleList(blocks), block_channels

    def middle(self, channels: int) -> nn.ModuleList:
        """The layers at the lowest resolution."""
        return nn.ModuleList(
            [self.res_block(channels, channels), self.attention(channels), self.res_block(channels, channels)]
        )


def check_sizes(sample_size: int, widths: Sequence[int], norm_num_groups: int) -> None:
    """Refuses images that cannot be halved once for each level but the first, and widths that groups do not divide."""
    factor = 2 ** (len(widths) - 1)
    if sample_size % factor:
        raise ValueError(
            f"`sample_size` must be a multiple of {factor} for {len(widths)} levels, got {sample_size}; "
            "use fewer entries in `channel_mult` or another size."
        )
    for width in widths:
        if width % norm_num_groups:
            raise ValueError(
                f"`norm_num_groups` must divide every level's width, got {norm_num_groups} for {width} "
                "channels; lower it or change `model_channels`."
            )
