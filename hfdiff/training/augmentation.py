"""What is drawn anew for each image of a batch: crops, mirrors, shifts."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for each image of a batch, in this order.

    Args:
        crop: take a square from anywhere in the image, not from its centre.
        flip: mirror left and right, every second time; all images, or those of the set that are true, bool (N,).
        shift: move by up to this many pixels each way; the border's pixels are repeated outwards.
    """

    crop: bool = False
    flip: bool | Tensor = False
    shift: int = 0

    def __call__(self, images: Any, index: Tensor, generator: torch.Generator) -> Tensor:
        """The images (B, C, H, W) of an index (B,) of an [`ImageSet`], or of a tensor where `crop` is not set."""
        x0 = images.crop(index, torch.rand(len(index), 2, generator=generator)) if self.crop else images[index]
        if self.flip is not False:
            mirrored = torch.rand(len(x0), 1, 1, 1, generator=generator) < 0.5
            if isinstance(self.flip, Tensor):
                mirrored &= self.flip[index].view(-1, 1, 1, 1)
            x0 = torch.where(mirrored, x0.flip(-1), x0)
        return random_shift(x0, self.shift, generator) if self.shift else x0


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Moves each image by -pixels to pixels in both directions, its border repeated; (B, C, H, W) to the same."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    top, left = torch.randint(2 * pixels + 1, (2, batch, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    image, channel = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
