"""The UNet of a training script: diffusers' UNet2DModel or ADM's, new, or another one with classes or without."""

from typing import TypeAlias

import torch
from diffusers import UNet2DModel
from torch import nn

from ..data.labelled import LabelledImages
from ..models.adm_unet import ADMUNet
from .settings import DDPMSettings, UNetSettings

UNet: TypeAlias = UNet2DModel | ADMUNet


def build_unet(
    settings: UNetSettings, data: LabelledImages, outputs: int = 1, num_class_embeds: int | None = None
) -> UNet2DModel:
    """The UNet for a dataset's images, (N, C, H, W).

    Args:
        settings: its sizes.
        data: the dataset.
        outputs: output channels per channel of the images.
        num_class_embeds: K, classes that it is told.

    Raises:
        ValueError: when the images cannot be halved once per level.
    """
    channels, size = _channels_and_size(settings, data)
    attends = _attends(settings)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=outputs * channels,
        block_out_channels=settings.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        layers_per_block=settings.layers_per_block,
        norm_num_groups=settings.norm_num_groups,
        attention_head_dim=settings.attention_head_dim,
        dropout=settings.dropout,
        num_class_embeds=num_class_embeds,
    )


def build_adm_unet(
    settings: DDPMSettings, data: LabelledImages, outputs: int = 1, num_class_embeds: int | None = None
) -> ADMUNet:
    """The UNet of Dhariwal & Nichol (2021) for a dataset's images; arguments as in [`build_unet`].

    Raises:
        ValueError: when the images cannot be halved once per level.
    """
    channels, size = _channels_and_size(settings, data)
    first = settings.block_out_channels[0]
    heads = (
        {"num_head_channels": settings.attention_head_dim}
        if settings.num_heads is None
        else {"num_heads": settings.num_heads}
    )
    return ADMUNet(
        sample_size=size,
        in_channels=channels,
        out_channels=outputs * channels,
        model_channels=first,
        channel_mult=tuple(width // first for width in settings.block_out_channels),
        num_res_blocks=settings.layers_per_block,
        attention_downsamples=tuple(2**level for level, attend in enumerate(_attends(settings)) if attend),
        num_class_embeds=num_class_embeds,
        dropout=settings.dropout,
        norm_num_groups=settings.norm_num_groups,
        **heads,
    )


def _channels_and_size(settings: UNetSettings, data: LabelledImages) -> tuple[int, int]:
    channels, size = data.images.shape[1:3]
    levels = len(settings.block_out_channels)
    if size % 2 ** (levels - 1):
        raise ValueError(
            f"`resolution` must be a multiple of {2 ** (levels - 1)} for {levels} levels, got {size}; "
            "give another, or fewer `block_out_channels`."
        )
    return channels, size


def _attends(settings: UNetSettings) -> list[bool]:
    """Whether each level has attention."""
    levels = len(settings.block_out_channels)
    return [level in settings.attention or level - levels in settings.attention for level in range(levels)]


def class_embedding(unet: UNet) -> str:
    """The name of the embedding of the classes."""
    return "label_emb" if isinstance(unet, ADMUNet) else "class_embedding"


def time_projection(unet: UNet) -> str:
    """The name of the last layer of the embedding of time."""
    return "time_embed.2" if isinstance(unet, ADMUNet) else "time_embedding.linear_2"


def _same_but(unet: UNet, num_class_embeds: int | None) -> UNet:
    """A new UNet of the same config but for the classes."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}  # nor its defaults' names
    return type(unet).from_config({**config, "num_class_embeds": num_class_embeds})


def with_classes(unet: UNet, num_class_embeds: int) -> UNet:
    """The same function of (x_t, t), as a UNet that can learn to tell classes apart: its embeddings are zero."""
    told = _same_but(unet, num_class_embeds)
    told.load_state_dict(unet.state_dict(), strict=False)
    nn.init.zeros_(told.get_submodule(class_embedding(told)).weight)
    return told


@torch.no_grad()
def without_classes(unet: UNet) -> UNet:
    """The unconditional UNet that a class-conditional one is when it is told its last class, which stands for none.

    The class is added to the time's embedding, so its vector becomes part of that embedding's bias.
    """
    plain = _same_but(unet, None)
    state = unet.state_dict()
    vector = state.pop(f"{class_embedding(unet)}.weight")[-1]
    bias = f"{time_projection(unet)}.bias"
    state[bias] = state[bias] + vector
    plain.load_state_dict(state)
    return plain.to(unet.dtype)
