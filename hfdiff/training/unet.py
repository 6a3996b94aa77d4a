"""The UNet of a training script: its settings, and diffusers' UNet2DModel made of them."""

from dataclasses import dataclass

from diffusers import UNet2DModel
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from ..data.labelled import LabelledImages
from .config import TrainingSettings


@dataclass(kw_only=True)
class UNetSettings(TrainingSettings):
    """Settings of a UNet.

    Args:
        block_out_channels: widths of the UNet, one per level; each level after the first halves height and width.
        layers_per_block: residual blocks per level.
        attention: levels with attention, from 0 for the images' own size; negative numbers count from the last.
        norm_num_groups: groups of each group normalisation.
        attention_head_dim: channels per attention head.
        dropout: dropout probability in residual blocks.
    """

    block_out_channels: tuple[PositiveInt, ...] = (16, 32)
    layers_per_block: PositiveInt = 1
    attention: tuple[int, ...] = (-1,)
    norm_num_groups: PositiveInt = 8
    attention_head_dim: PositiveInt = 16
    dropout: ClosedUnitInterval = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        if not all(-levels <= level < levels for level in self.attention):
            raise ValueError(f"`attention` must name levels from {-levels} to {levels - 1}, got {self.attention}.")
        for width in self.block_out_channels:
            if width % self.norm_num_groups or width == self.norm_num_groups:
                raise ValueError(
                    f"`norm_num_groups` must divide every width with at least 2 channels per group, since one alone "
                    f"normalises the time embedding away, got {self.norm_num_groups} for {width} channels; lower it."
                )
        for level in {*self.attention, -1}:  # the middle block attends, too
            if self.block_out_channels[level] % self.attention_head_dim:
                raise ValueError(
                    f"`attention_head_dim` must divide the widths with attention, got {self.attention_head_dim} for "
                    f"{self.block_out_channels[level]} channels; lower it."
                )


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
