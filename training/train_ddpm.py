"""Trains a denoising diffusion model (Ho et al. 2020) and saves it as a pipeline folder: `unet/` and `scheduler/`.

    accelerate launch training/train_ddpm.py --output_dir runs/digits
    accelerate launch training/train_ddpm.py --config training/recipes/mnist-ddpm.yaml --dataset_name ylecun/mnist

After `import hfdiff`, the folder opens with `diffusers.DDPMPipeline.from_pretrained`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffusers import DDPMPipeline, UNet2DModel
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.config import TrainingSettings, parse_settings
from hfdiff.training.data import Batch, BatchStream, load_images
from hfdiff.training.loop import make_accelerator, train
from hfdiff.training.losses import ddpm_loss


@dataclass(kw_only=True)
class DDPMSettings(TrainingSettings):
    """Settings of a diffusion model's training.

    Args:
        block_out_channels: widths of the UNet, one per level; each level after the first halves height and width.
        layers_per_block: residual blocks per level.
        attention: levels with attention, from 0 for the images' own size; negative numbers count from the last.
        norm_num_groups: groups of each group normalisation.
        attention_head_dim: channels per attention head.
        num_train_timesteps: T, length of the chain.
        beta_schedule: the noise levels, by a name of hfdiff.schedulers.noise.make_betas.
        prediction_type: what the UNet predicts: the noise, x_0 or v.
    """

    block_out_channels: tuple[PositiveInt, ...] = (32, 64)
    layers_per_block: PositiveInt = 1
    attention: tuple[int, ...] = (-1,)
    norm_num_groups: PositiveInt = 8
    attention_head_dim: PositiveInt = 32
    num_train_timesteps: PositiveInt = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"

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


def make_unet(settings: DDPMSettings, images: Tensor) -> UNet2DModel:
    """The UNet for images (N, C, H, W).

    Raises:
        ValueError: when the images cannot be halved once per level.
    """
    channels, size = images.shape[1:3]
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
        out_channels=channels,
        block_out_channels=settings.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        layers_per_block=settings.layers_per_block,
        norm_num_groups=settings.norm_num_groups,
        attention_head_dim=settings.attention_head_dim,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script with the given flags, or those of the process."""
    settings = parse_settings(DDPMSettings, argv, __doc__ or "")
    data = load_images(settings.dataset, image_column=settings.image_column, resolution=settings.resolution)
    scheduler = DDPMScheduler(
        num_train_timesteps=settings.num_train_timesteps,
        beta_schedule=settings.beta_schedule,
        prediction_type=settings.prediction_type,
    )
    batches = BatchStream(data, settings.train_batch_size, len(scheduler), settings.seed)
    accelerator = make_accelerator(settings)
    unet = make_unet(settings, data.images)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return ddpm_loss(model, scheduler, *batch[:3])

    train(settings, accelerator, unet, batches, loss)
    if accelerator.is_main_process:
        DDPMPipeline(unet, scheduler).save_pretrained(settings.output_dir)


if __name__ == "__main__":
    main()
