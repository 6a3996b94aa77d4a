"""Building blocks of the ADM networks (Dhariwal & Nichol 2021, appendix A): residual block, attention, pooling.

Parameter names and shapes are those of OpenAI's guided-diffusion, so its state dicts load as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with its statistics in float32 at least, returned in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        out = F.group_norm(input.to(dtype), self.num_groups, self.weight.to(dtype), self.bias.to(dtype), self.eps)
        return out.to(input.dtype)


def zero_init(module: nn.Module) -> nn.Module:
    """Sets a module's parameters to zero, so that the branch it ends starts as the zero function."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def split_heads(qkv: Tensor, num_heads: int, new_attention_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Splits (B, 3·C, L) into three (B, heads, L, C/heads).

    Rows are stored as [head][q, k, v], or as [q, k, v][head] in the new order; the wrong order raises no error.
    """
    batch, _width, length = qkv.shape
    if new_attention_order:
        q, k, v = qkv.view(batch, 3, num_heads, -1, length).unbind(1)
    else:
        q, k, v = qkv.view(batch, num_heads, 3, -1, length).unbind(2)
    return q.transpose(-1, -2), k.transpose(-1, -2), v.transpose(-1, -2)


def attend(qkv: Tensor, num_heads: int, new_attention_order: bool) -> Tensor:
    """Softmax attention of (B, 3·C, L) projections over L, returned as (B, C, L)."""
    q, k, v = split_heads(qkv, num_heads, new_attention_order)
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)


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
        flat = x.flatten(2)
        h = attend(self.qkv(self.norm(flat)), self.num_heads, self.new_attention_order)
        return (flat + self.proj_out(h)).view_as(x)


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
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], dim=-1) + self.positional_embedding.to(x.dtype)
        return attend(self.qkv_proj(tokens), self.num_heads, new_attention_order=True)[:, :, 0]

    def project(self, feature: Tensor) -> Tensor:
        """Maps (B, C) to (B, out_channels)."""
        return self.c_proj(feature[:, :, None])[:, :, 0]

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
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = nn.AvgPool2d(2) if down else nn.Identity()
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
        """Maps (B, channels, H, W) and (B, emb_channels) to (B, out_channels, H, W), or half the size with `down`."""
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
