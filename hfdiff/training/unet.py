"""The UNet of a training script: diffusers' UNet2DModel, new, or another one with classes or without."""

import torch
from diffusers import UNet2DModel
from torch import nn

from ..data.labelled import LabelledImages
from .settings import UNetSettings


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
    channels, size = data.images.shape[1:3]
    levels = len(settings.block_out_channels)
    if size % 2 ** (levels - 1):
        raise ValueError(
            f"`resolution` must be a multiple of {2 ** (levels - 1)} for {levels} levels, got {size}; "
            "give another, or fewer `block_out_channels`."
        )
    attends = [level in settings.attention or level - levels in settings.attention for level in range(levels)]
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


def with_classes(unet: UNet2DModel, num_class_embeds: int) -> UNet2DModel:
    """The same function of (x_t, t), as a UNet that can learn to tell classes apart: its embeddings are zero."""
    told = UNet2DModel.from_config({**unet.config, "num_class_embeds": num_class_embeds})
    told.load_state_dict(unet.state_dict(), strict=False)
    nn.init.zeros_(told.class_embedding.weight)
    return told


@torch.no_grad()
def without_classes(unet: UNet2DModel) -> UNet2DModel:
    """The unconditional UNet that a class-conditional one is when it is told its last class, which stands for none.

    The class is added to the time's embedding, so its vector becomes part of that embedding's bias.
    """
    plain = UNet2DModel.from_config({**unet.config, "num_class_embeds": None})
    state = unet.state_dict()
    vector = state.pop("class_embedding.weight")[-1]
    state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + vector
    plain.load_state_dict(state)
    return plain.to(unet.dtype)
