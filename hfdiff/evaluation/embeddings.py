"""Features of vision transformers that know no classes: DINOv2 and CLIP, as their metrics take them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.files import file_checksum
from .features import ImageFeatures, best_device, match_channels


class Kind(NamedTuple):
    """A family of networks.

    Args:
        model: the class of transformers that opens it.
        families: `model_type` in the config of those it opens.
        embed: the features (B, D) in its output.
    """

    model: str
    families: tuple[str, ...]
    embed: Any


def _class_token(output: Any) -> Tensor:
    """The class token after the last normalisation."""
    return output.last_hidden_state[:, 0]


def _image_embedding(output: Any) -> Tensor:
    """The projected embedding, of length 1."""
    return nn.functional.normalize(output.image_embeds, dim=1)


KINDS = {
    "dinov2": Kind("AutoModel", ("dinov2", "dinov2_with_registers"), _class_token),
    "clip": Kind("CLIPVisionModelWithProjection", ("clip", "clip_vision_model"), _image_embedding),
}


class EmbeddingFeatures:
    """Features of a DINOv2 (Stein et al. 2023, "Exposing flaws of generative model evaluation metrics") or of a CLIP
    (Jayasumana et al. 2024, "Rethinking FID"), without probabilities or spatial features.

    Images are resized to the network's square by its processor's filter, uncropped, as both papers' code does.

    Args:
        kind: "dinov2" or "clip".
        folder: of the network, with its image processor.
        name: for reports.

    Raises:
        ValueError: for a network of another kind, or one that cannot be loaded.
    """

    def __init__(self, kind: str, folder: Path, name: str) -> None:
        import transformers

        loader, families, self.embed = KINDS[kind]
        try:
            family = transformers.PretrainedConfig.get_config_dict(folder)[0].get("model_type")
            if family not in families:
                raise ValueError(f"its model_type is {family!r}, not {' or '.join(map(repr, families))}")
            self.processor = transformers.AutoImageProcessor.from_pretrained(folder)
            model = getattr(transformers, loader).from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`features` must name a {kind} of transformers with its image processor, got {name!r}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        self.model = model.eval().to(best_device())
        square = self.processor.crop_size or self.processor.size
        self.size = {side: square[side] for side in ("height", "width")}
        self.provenance = {"name": name, "weights_sha256": file_checksum(folder), "resize": self.size}

    def __call__(self, images: Tensor) -> ImageFeatures:
        pixels = match_channels(images, 3).permute(0, 2, 3, 1).numpy()
        prepared = {"size": self.size, "do_center_crop": False, "input_data_format": "channels_last"}
        batch = self.processor(images=list(pixels), return_tensors="pt", **prepared)
        return ImageFeatures(self.embed(self.model(batch["pixel_values"].to(self.model.device))))
