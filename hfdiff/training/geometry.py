"""Augmentation that does not leak into samples: pictures are moved, and the model is told how (Karras et al. 2022).

The model learns p(x | change) through a label, and draws from p(x | no change) when it is told nothing, which is the
label 0. Reference: "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2 and table 6.

A picture is mirrored, scaled, turned, stretched and shifted, in this order. Its label says how, (9,), and determines
the change:

    0, 1   mirrored left and right, up and down: 0 or 1
    2      a: enlarged by 2^(a/5)
    3, 4   cos w - 1, sin w: turned clockwise by w
    5, 6   a cos 2r, a sin 2r: stretched by 2^(a/5) along the direction r, clockwise from right, shrunk as much across
    7, 8   a, b: shifted to the right by a/8 and down by b/8 of the picture's size
"""

import math

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .unet import UNet, time_projection

NUM_LABELS = 9
SCALE = 0.2 * math.log(2)  # of a label of 1, as a natural logarithm
OF_UNET = "unet."  # the UNet's own tensors among those of a `ToldUNet`
SHIFT = 0.125  # of a label of 1, in sizes of the picture
KEEPS_CLASS = torch.tensor([False] * 2 + [True] + [False] * 2 + [True] * 4)  # in a label: all but mirrors and turns


def draw_labels(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Labels (count, 9) of changes that each picture undergoes, each with this probability; a mirror with half of it.

    Differs from EDM: left and right are mirrored no more often than the rest; r enters the label twice, since
    stretching along one direction is shrinking across it, which its label does not tell apart.

    Args:
        count: of pictures.
        probability: of each of the six changes.
        generator: of the draw.
    """

    def sometimes(values: Tensor) -> Tensor:
        return torch.where(torch.rand(count, 1, generator=generator) < probability, values, torch.zeros(()))

    def turns() -> Tensor:
        return (torch.rand(count, 1, generator=generator) * 2 - 1) * math.pi

    def normal(width: int) -> Tensor:
        return torch.randn(count, width, generator=generator)

    mirrors = [sometimes(torch.randint(2, (count, 1), generator=generator).float()) for _ in range(2)]
    scale, angle = sometimes(normal(1)), sometimes(turns())
    stretch, direction = sometimes(normal(1)), turns()
    direction = torch.where(torch.rand(count, 1, generator=generator) < 0.5, direction, torch.zeros(()))
    turned = [angle.cos() - 1, angle.sin()]
    stretched = [stretch * direction.cos(), stretch * direction.sin()]
    return torch.cat([*mirrors, scale, *turned, *stretched, sometimes(normal(2))], dim=1)


def change(images: Tensor, labels: Tensor) -> Tensor:
    """Pictures as their labels say; those of label 0 are the same bits.

    Between pixels it is interpolated by cubics. Border pixels are repeated outwards, so what stands on white stays on
    white. Differs from EDM, which reflects: a mirror image of the object would stand beside it.

    Args:
        images: in [-1, 1], (B, C, H, H).
        labels: (B, 9).
    """
    images = torch.where(labels[:, 0, None, None, None] > 0, images.flip(-1), images)
    images = torch.where(labels[:, 1, None, None, None] > 0, images.flip(-2), images)
    moved = (labels[:, 2:] != 0).any(dim=1)
    if moved.any():
        grid = F.affine_grid(sources(labels[moved]), list(images[moved].shape), align_corners=False)
        warped = F.grid_sample(images[moved], grid, mode="bicubic", padding_mode="border", align_corners=False)
        images[moved] = warped.clamp(-1, 1)
    return images


def sources(labels: Tensor) -> Tensor:
    """The affine maps (B, 2, 3) from a place in the changed picture to the place it shows of the one before.

    Places are (right, down) of the centre, in halves of the picture's size.
    """
    _, _, scale, cosine, sine, along, across, right, down = labels.double().unbind(dim=1)
    cosine = cosine + 1
    norm = (along.square() + across.square()).sqrt()
    even, odd = (SCALE * norm).cosh(), (SCALE * norm).sinh() / norm.clamp(min=1e-12)
    squeeze = _matrix(even - odd * along, -odd * across, -odd * across, even + odd * along)
    turn_back = _matrix(cosine, sine, -sine, cosine)
    shrink = (-SCALE * scale).exp().view(-1, 1, 1)
    linear = shrink * (turn_back @ squeeze)
    shift = 2 * SHIFT * torch.stack([right, down], dim=1).unsqueeze(2)
    return torch.cat([linear, -linear @ shift], dim=2).to(labels.dtype)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


class ToldUNet(nn.Module):
    """A UNet that is also told, in training, how its pictures were changed.

    The label enters as a linear map without a bias, added to the embedding of the timestep. So the UNet alone is the
    same function as this with labels of 0, and is what is saved; the map is part of checkpoints only. It starts from 0,
    which leaves a UNet to start from as it is.

    Args:
        unet: the UNet, which is trained in place.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self.embedding = time_projection(unet)
        width = unet.get_submodule(self.embedding).out_features
        self.label_embedding = nn.Linear(NUM_LABELS, width, bias=False)
        nn.init.zeros_(self.label_embedding.weight)

    def enable_gradient_checkpointing(self) -> None:
        """As the UNet's."""
        self.unet.enable_gradient_checkpointing()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> UNet2DOutput:
        """The UNet's output for pictures of such labels, (B, 9); without them, for pictures as they are."""
        if augment_labels is None:
            return self.unet(sample, timestep, class_labels)
        told = self.label_embedding(augment_labels)
        hook = self.unet.get_submodule(self.embedding).register_forward_hook(
            lambda module, inputs, output: output + told
        )
        try:
            return self.unet(sample, timestep, class_labels)
        finally:
            hook.remove()
