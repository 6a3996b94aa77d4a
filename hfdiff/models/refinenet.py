"""The RefineNet of score networks: a dilated residual encoder, and a decoder that refines it level by level.

References: Lin et al. 2017, "RefineNet", for the decoder; Song & Ermon 2019, appendix A, and 2020, appendix B, for the
networks of NCSN and NCSNv2.

Every layer maps (h, t): a map h, (B, C, H, W), and the indices t of the noise levels, (B,), larger is noisier. A
network that is not conditioned on the level takes t and leaves it unused.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5  # of every variance
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "lrelu": partial(nn.LeakyReLU, negative_slope=0.2),
    "swish": nn.SiLU,
}
MakeNorm = Callable[[int], nn.Module]  # a normalisation of so many channels


def instance_norm_plus(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """InstanceNorm++ (Song & Ermon 2019, appendix A.1): γ ((x - μ)/s + α (μ - m)/v) + β.

    μ and s are the mean and standard deviation of each channel's map, m and v those of the means over the channels,
    with the unbiased variance v². The means tell the levels of brightness that instance normalisation removes.

    Args:
        x: (B, C, H, W); statistics are in float32 at least.
        gamma: γ, (B, C) or (1, C).
        alpha: α, of the same shape.
        beta: β, of the same shape.

    Returns:
        (B, C, H, W) in the dtype of `x`.
    """
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    gamma, alpha, beta = (coefficient.to(h.dtype) for coefficient in (gamma, alpha, beta))
    means = h.mean(dim=(2, 3))
    variance, centre = torch.var_mean(means, dim=1, keepdim=True)
    shift = gamma * alpha * (means - centre) * torch.rsqrt(variance + EPS) + beta
    # batch normalisation of one image with B·C channels: each map's own statistics, scale and shift in one pass
    maps, scale = h.reshape(1, -1, *h.shape[2:]), gamma.expand_as(shift)
    h = F.batch_norm(maps, None, None, scale.flatten(), shift.flatten(), training=True, eps=EPS).view_as(h)
    return h.to(x.dtype)


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ with the same coefficients at every noise level (NCSNv2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.alpha = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return instance_norm_plus(h, self.gamma[None], self.alpha[None], self.beta[None])


class ConditionalInstanceNormPlus(nn.Module):
    """InstanceNorm++ with coefficients of each noise level's own (NCSN): row t of `embed` is [γ, α, β]."""

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_levels, 3 * channels)
        nn.init.normal_(self.embed.weight, 1, 0.02)
        nn.init.zeros_(self.embed.weight.data[:, 2 * channels :])

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return instance_norm_plus(h, *self.embed(t).chunk(3, dim=1))


class NoNorm(nn.Module):
    """The identity, where NCSNv2 has no normalisation: in its decoder."""

    def __init__(self, _channels: int) -> None:
        super().__init__()

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return h


def conv3x3(channels: int, out_channels: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3×3 convolution that keeps height and width."""
    return nn.Conv2d(channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)


class ConvMeanPool(nn.Module):
    """A convolution, then the mean of each 2×2 pixels."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, h: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(h), 2)


class ResidualBlock(nn.Module):
    """Two normalised, activated convolutions and a skip connection.

    Args:
        channels: channels of the input.
        out_channels: channels of the output.
        act: activation.
        norm: normalisation.
        dilation: of both convolutions.
        enter: whether the block begins a level, with a convolution on its skip; a level without dilation then halves
            height and width.
    """

    def __init__(
        self, channels: int, out_channels: int, act: nn.Module, norm: MakeNorm, *, dilation: int, enter: bool
    ) -> None:
        super().__init__()
        self.act = act
        self.normalize1 = norm(channels)
        self.conv1 = conv3x3(channels, channels, dilation)
        self.normalize2 = norm(channels)
        self.conv2: nn.Module
        self.shortcut: nn.Module
        if enter and dilation == 1:
            self.conv2 = ConvMeanPool(channels, out_channels, 3)
            self.shortcut = ConvMeanPool(channels, out_channels, 1)
        else:
            self.conv2 = conv3x3(channels, out_channels, dilation)
            self.shortcut = conv3x3(channels, out_channels, dilation) if enter else nn.Identity()

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        residual = self.conv1(self.act(self.normalize1(h, t)))
        residual = self.conv2(self.act(self.normalize2(residual, t)))
        return self.shortcut(h) + residual


class ResidualConvUnit(nn.Module):
    """RefineNet's RCU: residual units of two activated convolutions."""

    def __init__(self, channels: int, num_units: int, act: nn.Module, norm: MakeNorm) -> None:
        super().__init__()
        self.act = act
        self.norms = nn.ModuleList(norm(channels) for _ in range(2 * num_units))
        self.convs = nn.ModuleList(conv3x3(channels, channels, bias=False) for _ in range(2 * num_units))

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        layers = list(zip(self.norms, self.convs))
        for pair in zip(layers[::2], layers[1::2]):
            residual = h
            for norm, conv in pair:
                residual = conv(self.act(norm(residual, t)))
            h = h + residual
        return h


class MultiResolutionFusion(nn.Module):
    """RefineNet's MSF: maps brought to the same channels and size, and summed."""

    def __init__(self, widths: Sequence[int], out_channels: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(width) for width in widths)
        self.convs = nn.ModuleList(conv3x3(width, out_channels) for width in widths)

    def forward(self, maps: list[Tensor], t: Tensor) -> Tensor:
        """Sums maps (B, C_i, H_i, W_i) at the first one's size."""
        size = maps[0].shape[2:]
        convolved = [conv(norm(h, t)) for h, norm, conv in zip(maps, self.norms, self.convs)]
        first, *others = (F.interpolate(h, size=size, mode="bilinear", align_corners=True) for h in convolved)
        return sum(others, first)


class ChainedResidualPooling(nn.Module):
    """RefineNet's CRP: twice pooled over 5×5 pixels and convolved, every stage added."""

    def __init__(self, channels: int, act: nn.Module, norm: MakeNorm, pool: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.pool = pool
        self.norms = nn.ModuleList(norm(channels) for _ in range(2))
        self.convs = nn.ModuleList(conv3x3(channels, channels, bias=False) for _ in range(2))

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        h = self.act(h)
        path = h
        for norm, conv in zip(self.norms, self.convs):
            path = conv(self.pool(norm(path, t)))
            h = h + path
        return h


class RefineBlock(nn.Module):
    """Adapts the maps given, fuses them where there are two, pools context and smooths the result.

    Args:
        widths: channels of each map: of the encoder, and of the block before, where there is one.
        out_channels: channels of the output.
        act: activation.
        norm: normalisation.
        pool: the pooling over 5×5 pixels.
        units: residual units at the end.
    """

    def __init__(
        self, widths: Sequence[int], out_channels: int, act: nn.Module, norm: MakeNorm, *, pool: nn.Module, units: int
    ) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(ResidualConvUnit(width, 2, act, norm) for width in widths)
        self.msf = MultiResolutionFusion(widths, out_channels, norm) if len(widths) > 1 else None
        self.crp = ChainedResidualPooling(out_channels, act, norm, pool)
        self.output_convs = ResidualConvUnit(out_channels, units, act, norm)

    def forward(self, maps: list[Tensor], t: Tensor) -> Tensor:
        maps = [adapt(h, t) for h, adapt in zip(maps, self.adapt_convs)]
        h = maps[0] if self.msf is None else self.msf(maps, t)
        return self.output_convs(self.crp(h, t), t)


def make_encoder(widths: Sequence[int], dilations: Sequence[int], act: nn.Module, norm: MakeNorm) -> nn.ModuleList:
    """Two residual blocks per level."""
    stages = nn.ModuleList()
    for level, (before, width, dilation) in enumerate(zip([widths[0], *widths], widths, dilations)):
        first = ResidualBlock(before, width, act, norm, dilation=dilation, enter=level > 0)
        second = ResidualBlock(width, width, act, norm, dilation=dilation, enter=False)
        stages.append(nn.ModuleList([first, second]))
    return stages


def make_decoder(widths: Sequence[int], act: nn.Module, norm: MakeNorm, pool: nn.Module) -> nn.ModuleList:
    """A refining block per level, from the last to the first; each has the width of the level it leads to."""
    outputs = [widths[-1], *reversed([widths[0], *widths[:-2]])]
    blocks = nn.ModuleList()
    for index, (width, out_channels) in enumerate(zip(reversed(widths), outputs)):
        inputs = [width, *outputs[:index][-1:]]
        units = 3 if index == len(widths) - 1 else 1
        blocks.append(RefineBlock(inputs, out_channels, act, norm, pool=pool, units=units))
    return blocks


class RefineNet(nn.Module):
    """The network of NCSN, conditioned by its normalisations, and of NCSNv2, whose decoder has none.

    Args:
        in_channels: channels of the images.
        widths: channels of each level.
        dilations: of each level; a level after the first halves height and width where it is 1.
        nonlinearity: a name of `ACTIVATIONS`.
        num_levels: L to condition on the noise level, None not to.

    Raises:
        ValueError: for an unknown nonlinearity.
    """

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by diffusers

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        dilations: Sequence[int],
        nonlinearity: str,
        num_levels: int | None = None,
    ) -> None:
        super().__init__()
        if nonlinearity not in ACTIVATIONS:
            raise ValueError(f"`nonlinearity` must be one of {tuple(ACTIVATIONS)}, got {nonlinearity!r}.")
        self.gradient_checkpointing = False
        self.act = ACTIVATIONS[nonlinearity]()
        norm: MakeNorm = InstanceNormPlus
        refine_norm: MakeNorm = NoNorm
        pool: nn.Module = nn.MaxPool2d(5, stride=1, padding=2)
        if num_levels is not None:
            norm = refine_norm = partial(ConditionalInstanceNormPlus, num_levels=num_levels)
            pool = nn.AvgPool2d(5, stride=1, padding=2)
        self.conv_in = conv3x3(in_channels, widths[0])
        self.stages = make_encoder(widths, dilations, self.act, norm)
        self.refine_blocks = make_decoder(widths, self.act, refine_norm, pool)
        self.norm_out = norm(widths[0])
        self.conv_out = conv3x3(widths[0], in_channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps images (B, C, H, W), H and W even at each halving, and level indices (B,) to the images' shape."""
        h = self.conv_in(x)
        maps = []
        for stage in self.stages:
            for block in stage.children():
                h = self._run(block, h, t)
            maps.append(h)
        refined: list[Tensor] = []
        for block in self.refine_blocks:
            refined = [self._run(block, [maps.pop(), *refined], t)]
        return self.conv_out(self.act(self.norm_out(refined[0], t)))

    def _run(self, block: nn.Module, h: Tensor | list[Tensor], t: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, h, t)
        return block(h, t)
