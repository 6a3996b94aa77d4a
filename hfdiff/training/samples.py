"""Images drawn from a diffusion model in training, with or without classes."""

import copy
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..data.pictures import image_grid, to_bytes, to_pil
from ..pipelines.pipeline_ncsn import NCSNPipeline
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..schedulers.scheduling_ddpm import DDPMScheduler

BATCH_SIZE = 256
PIXELS_SHOWN = 64  # small images are enlarged to about this size


@torch.no_grad()
def draw_images(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    count: int,
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images by ancestral sampling (Ho et al. 2020, algorithm 2), as bytes (N, C, H, W) on the CPU.

    A class-conditional UNet draws its classes in turn: image i is of class i modulo their number.

    Args:
        unet: the model, in evaluation mode.
        scheduler: the trained chain; left as it is.
        count: N.
        num_inference_steps: model calls per image; the trained chain's length where that is less.
        generator: source of all noise.
    """
    chain = copy.copy(scheduler)
    chain.set_timesteps(min(num_inference_steps, len(scheduler)))
    classes = unet.config.num_class_embeds
    size, drawn = unet.config.sample_size, []
    for numbers in torch.arange(count, device=unet.device).split(BATCH_SIZE):
        condition = {"class_labels": numbers % classes} if classes else {}
        sample = randn_tensor((len(numbers), unet.config.in_channels, size, size), generator, unet.device, unet.dtype)
        for t in chain.timesteps:
            output = unet(sample, t, **condition).sample
            sample = chain.step(output, t, sample, generator=generator, return_dict=False)[0]
        drawn.append(torch.from_numpy(to_bytes((sample.cpu().float() / 2 + 0.5).numpy())))
    return torch.cat(drawn)


def draw_by_langevin(
    model: ModelMixin,
    scheduler: AnnealedLangevinScheduler,
    count: int,
    num_inference_steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images of a score network by annealed Langevin dynamics, as bytes (N, C, H, W) on the CPU.

    Args:
        model: the network, in evaluation mode.
        scheduler: its noise levels; left as it is.
        count: N.
        num_inference_steps: model calls per image.
        generator: source of all noise.
    """
    pipe = NCSNPipeline(model, copy.copy(scheduler))
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for numbers in torch.arange(count).split(BATCH_SIZE):
        (images,) = pipe(len(numbers), num_inference_steps, generator, output_type="np", return_dict=False)
        drawn.append(torch.from_numpy(to_bytes(images)).permute(0, 3, 1, 2))
    return torch.cat(drawn)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Writes images, bytes (N, C, H, W), as a picture, of about as many rows as columns by default."""
    pictures = to_pil(images.permute(0, 2, 3, 1).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, PIXELS_SHOWN // images.shape[-1])
    image_grid(pictures, columns or round(len(images) ** 0.5), scale).save(path)
