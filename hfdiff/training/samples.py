"""Images drawn from a model in training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.pictures import image_grid, to_pil
from ..pipelines.inputs import most_steps
from ..sampling.opening import OpenedPipeline
from ..sampling.sampler import Sampler
from ..sampling.settings import SamplingSettings

PIXELS_SHOWN = 64  # small images are enlarged to about this size


def draw_images(pipe: Any, count: int, num_inference_steps: int, seed: int, **options: Any) -> Tensor:
    """The first images of a seed, as bytes (N, C, H, W); of each class in turn where the pipeline has classes.

    Args:
        pipe: a pipeline of the model, with a scheduler of its own.
        count: N.
        num_inference_steps: model calls per image; the trained chain's length where that is less.
        seed: of the noise.
        options: further fields of [`SamplingSettings`].
    """
    steps = int(min(num_inference_steps, most_steps(pipe.scheduler)))
    settings = SamplingSettings(count, num_inference_steps=steps, seed=seed, **options)
    return torch.from_numpy(Sampler(OpenedPipeline(pipe), settings).draw_all()).permute(0, 3, 1, 2)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Writes images, bytes (N, C, H, W), as a picture, of about as many rows as columns by default."""
    pictures = to_pil(images.permute(0, 2, 3, 1).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, PIXELS_SHOWN // images.shape[-1])
    image_grid(pictures, columns or round(len(images) ** 0.5), scale).save(path)
