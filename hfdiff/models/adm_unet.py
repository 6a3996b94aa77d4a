"""The UNet of Dhariwal & Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis", in the original's form.

Time runs from clean to noisy: `timestep` 0 is almost clean. It holds what diffusers' `UNet2DModel` cannot: a head count
fixed over several widths, another one on the way up, a first multiplier other than one, and rescaled timesteps.
"""

from dataclasses import replace

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .layers import Blocks, GroupNorm32, Upsample, check_sizes, embed_time, zero_init


class ADMUNet(ModelMixin, ConfigMixin):
    """Denoising UNet with attention, a time embedding and, on request, class embeddings.

    Reference: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 3. Called as diffusers'
    `UNet2DModel` is. Parameters are named as in guided-diffusion's `UNetModel`, so its state dicts load as they are.

    Args:
        sample_size: height and width of the images.
        in_channels: C, channels of the images.
        out_channels: C, or 2C where the variance is learned.
        model_channels: base width; level i has `channel_mult[i] * model_channels` channels.
        channel_mult: one factor per resolution level; each level after the first halves height and width.
        num_res_blocks: residual blocks per level; one more on the way up.
        attention_downsamples: downsampling factors (1, 2, 4, ...) at which attention follows each residual block.
            The middle block always has attention.
        num_heads: attention heads, where `num_head_channels` is not given.
        num_head_channels: channels per attention head; fixes the head count by width.
        num_heads_upsample: attention heads on the way up, where they are others than `num_heads`.
        use_scale_shift_norm: condition by scale and shift (adaptive group norm) instead of addition.
        resblock_updown: resize inside residual blocks instead of by a convolution alone.
        use_new_attention_order: rows of the qkv projections are [q, k, v][head] instead of [head][q, k, v].
        num_class_embeds: K, classes that can be asked for; None for an unconditional model.
        dropout: dropout probability inside residual blocks.
        norm_num_groups: groups of each group normalisation.
        timestep_scale: the network sees `timestep_scale * timestep`.

    Raises:
        ValueError: for sizes that do not divide.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        model_channels: int = 32,
        channel_mult: tuple[float, ...] = (1, 2, 2),
        num_res_blocks: int = 1,
        attention_downsamples: tuple[int, ...] = (4,),
        num_heads: int = 1,
        num_head_channels: int | None = None,
        num_heads_upsample: int | None = None,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
        num_class_embeds: int | None = None,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        widths = [int(mult * model_channels) for mult in channel_mult]
        check_sizes(sample_size, widths, norm_num_groups)
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
        if num_class_embeds is not None:
            self.label_emb = nn.Embedding(num_class_embeds, make.emb_channels)
        self.input_blocks, block_channels = make.encoder(
            in_channels, widths, num_res_blocks, attention_downsamples, resblock_updown
        )
        self.middle_block = make.middle(widths[-1])
        make_up = make if num_heads_upsample is None else replace(make, num_heads=num_heads_upsample)
        self.output_blocks = _decoder(
            make_up, widths, block_channels, num_res_blocks, attention_downsamples, resblock_updown
        )
        self.out = nn.Sequential(
            GroupNorm32(norm_num_groups, widths[0]),
            nn.SiLU(),
            zero_init(nn.Conv2d(widths[0], out_channels, 3, padding=1)),
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicts from noisy images.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: t, one for all or (B,).
            class_labels: (B,) class indices, for a model with class embeddings and for no other.
            return_dict: return a `UNet2DOutput` instead of a tuple.

        Returns:
            (B, out_channels, H, W), in the model's dtype.

        Raises:
            ValueError: for class labels that are missing, or given to a model without classes.
        """
        emb = self._embed(sample, timestep, class_labels)
        first, *blocks = self.input_blocks.children()
        (conv_in,) = first.children()
        h = conv_in(sample.to(self.dtype))
        skips = [h]
        for block in blocks:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb)
        output = self.out(h)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _embed(self, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor | None) -> Tensor:
        """The embedding of time and class, (B, 4 model_channels)."""
        num_classes = self.config.num_class_embeds
        if (class_labels is None) != (num_classes is None):
            expected = "missing: this model" if class_labels is None else "given, and this model has none: it"
            raise ValueError(
                f"`class_labels` are {expected} was trained {'with' if num_classes else 'without'} classes; "
                f"{f'give (B,) indices below {num_classes}' if num_classes else 'leave them out'}."
            )
        emb = embed_time(timestep, sample, self.config.model_channels, self.config.timestep_scale)
        emb = self.time_embed(emb.to(self.dtype))
        return emb if class_labels is None else emb + self.label_emb(class_labels).to(emb.dtype)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        for layer in block.children():
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(layer, h, emb)
            else:
                h = layer(h, emb)
        return h


def _decoder(
    make: Blocks,
    widths: list[int],
    skip_channels: list[int],
    num_res_blocks: int,
    attention_downsamples: tuple[int, ...],
    resblock_updown: bool,
) -> nn.ModuleList:
    """The blocks back to the images' resolution; each takes the map of a block of the encoder, the last one first."""
    skip_channels = list(skip_channels)
    channels = widths[-1]
    blocks = []
    for level, width in reversed([*enumerate(widths)]):
        for index in range(num_res_blocks + 1):
            layers: list[nn.Module] = [make.res_block(channels + skip_channels.pop(), width)]
            channels = width
            if 2**level in attention_downsamples:
                layers.append(make.attention(channels))
            if level and index == num_res_blocks:
                layers.append(make.res_block(channels, channels, up=True) if resblock_updown else Upsample(channels))
            blocks.append(nn.ModuleList(layers))
    return nn.ModuleList(blocks)
