"""Features of vision transformers that know no classes: DINOv2 and CLIP, as their metrics take them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..data.files import file_checksum
from .features import ImageFeatures, best_device, match_channels


class Kind(NamedTuple):
    """A family of networks.

    Args:
        model: the class of transformers that opens it.
        families: `model_type` in the config of those it opens.
        embed: the features (B, D) in its output.
        crop: whether images lose what is outside their middle square, or are squashed to one.
    """

    model: str
    families: tuple[str, ...]
    embed: Callable[[Any], Tensor]
    crop: bool


def _class_token(output: Any) -> Tensor:
    """The class token after the last normalisation."""
    return output.last_hidden_state[:, 0]


def _image_embedding(output: Any) -> Tensor:
    """The projected embedding, of length 1."""
    return nn.functional.normalize(output.image_embeds, dim=1)


KINDS = {
    "dinov2": Kind("AutoModel", ("dinov2", "dinov2_with_registers"), _class_token, crop=False),
    "clip": Kind("CLIPVisionModelWithProjection", ("clip", "clip_vision_model"), _image_embedding, crop=True),
}


class EmbeddingFeatures:
    """Features of a DINOv2 (Stein et al. 2023, "Exposing flaws of generative model evaluation metrics") or of a CLIP
    (Jayasumana et al. 2024, "Rethinking FID"), without probabilities or spatial features.

    Images are resized to the network's square by its processor's filter, in Pillow, as the papers' code does: whole for
    DINOv2, their middle square for CLIP.

    Args:
        kind: "dinov2" or "clip".
        folder: of the network, with its image processor.
        name: for reports.

    Raises:
        ValueError: for a network of another kind, or one that cannot be loaded.
    """

    def __init__(self, kind: str, folder: Path, name: str) -> None:
        import transformers

        loader, families, self.embed, self.crop = KINDS[kind]
        try:
            family = transformers.PretrainedConfig.get_config_dict(folder)[0].get("model_type")
            if family not in families:
                raise ValueError(f"its model_type is {family!r}, not {' or '.join(map(repr, families))}")
            self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
            self.size = _square(self.processor)
            model = _open(getattr(transformers, loader), folder)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"`features` must name a {kind} of transformers with its image processor, got {name!r}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        self.model = model.eval().to(best_device())
        resize = {**self.size, "crop": "middle square" if self.crop else "none"}
        self.provenance = {"name": name, "weights_sha256": file_checksum(folder), "resize": resize}

    def __call__(self, images: Tensor) -> ImageFeatures:
        images = _middle_square(images) if self.crop else images
        pixels = match_channels(images, 3).permute(0, 2, 3, 1).numpy()
        prepared = {"size": self.size, "do_center_crop": False, "input_data_format": "channels_last"}
        batch = self.processor(images=list(pixels), return_tensors="pt", **prepared)
        return ImageFeatures(self.embed(self.model(batch["pixel_values"].to(self.model.device))))


def _square(processor: Any) -> dict[str, int]:
    """The height and width that a processor gives its network.

    Raises:
        ValueError: when it names none.
    """
    size = processor.crop_size if processor.do_center_crop else processor.size
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge), size.get("width", edge)
    if height is None or width is None:
        raise ValueError(f"its processor's size has no height and width, but {dict(size)}")
    return {"height": height, "width": width}


def _open(model: Any, folder: Path) -> nn.Module:
    """A network with all its weights; transformers would draw those that the folder lacks.

    Raises:
        ValueError: when it lacks some, or has them in other shapes.
    """
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # CLIP's text model, which is not needed, would be a table of unexpected weights
    try:
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        network, loading = model.from_pretrained(folder, dtype=torch.float32, **options)
    finally:
        logging.set_verbosity(verbosity)
    unfit = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if unfit:
        raise ValueError(f"{len(unfit)} of its weights are not there or do not fit its config, as {unfit[0]}")
    return network


def _middle_square(images: Tensor) -> Tensor:
    """The largest square in the middle of images (B, C, H, W)."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]
