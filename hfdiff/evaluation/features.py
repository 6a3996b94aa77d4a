"""Networks that turn images into features, each with a record of what it is.

An extractor maps bytes (B, C, H, W), as they are stored, to [`ImageFeatures`], and resizes and scales them as its
network wants. Channels are changed only where nothing is lost; sizes only by a network's own preprocessing.
"""

import hashlib
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

SPATIAL_CHANNELS = 7  # of a map, as guided-diffusion's evaluator takes them for sFID


class ImageFeatures(NamedTuple):
    """What a network says about a batch of images.

    Args:
        pooled: one vector per image, (B, D).
        probs: p(y|x), (B, K), where the network is a classifier.
        spatial: the first channels of a map, with its positions, flattened, (B, S), where it has one.
    """

    pooled: Tensor
    probs: Tensor | None = None
    spatial: Tensor | None = None


class FeatureExtractor(Protocol):
    """Maps uint8 (B, C, H, W) to [`ImageFeatures`]; `provenance` says in JSON values which network it is."""

    provenance: dict[str, Any]

    def __call__(self, images: Tensor) -> ImageFeatures: ...


class PixelFeatures:
    """The pixels themselves, from 0 to 1, in one row per image."""

    def __init__(self) -> None:
        self.provenance: dict[str, Any] = {"name": "pixels", "weights_sha256": "none", "resize": "none"}

    def __call__(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(images.flatten(1) / 255)


class ModuleFeatures:
    """Features of a module in Python.

    Args:
        module: maps uint8 (B, C, H, W) to features (B, D), or to [`ImageFeatures`]; it is put in evaluation mode.
        name: for reports; say what it resizes and scales.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module.eval()
        self.provenance = {"name": name, "weights_sha256": module_checksum(module), "resize": "the module's own"}

    def __call__(self, images: Tensor) -> ImageFeatures:
        output = self.module(images)
        return output if isinstance(output, ImageFeatures) else ImageFeatures(output)


def match_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images repeated in three channels, or those whose three channels are equal made grey; others as they are.

    Args:
        images: uint8, (B, C, H, W).
        channels: 1 or 3, what the network takes.

    Raises:
        ValueError: for colours that a network of grey images does not see.
    """
    if images.shape[1] < channels:
        return images.expand(-1, channels, -1, -1)
    if images.shape[1] > channels and not (images == images[:, :1]).all():
        raise ValueError(
            f"Images must have the {channels} channel of the network, got colours; make them grey in the same way "
            "for samples and reference, or take another network."
        )
    return images[:, :channels]


def first_channels(maps: Tensor) -> Tensor:
    """The first channels of maps (B, C, H, W), flattened in guided-diffusion's order, (B, H·W·7)."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def tap_output(module: nn.Module) -> list[Tensor]:
    """A list to which each call of the module adds its output; pop it."""
    taken: list[Tensor] = []
    module.register_forward_hook(lambda _, __, output: taken.append(output))
    return taken


def tap_input(module: nn.Module) -> list[Tensor]:
    """A list to which each call of the module adds its input; pop it."""
    taken: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    return taken


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def module_checksum(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, in the order of its state dict."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
