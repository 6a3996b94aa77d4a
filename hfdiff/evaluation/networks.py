"""The networks that features come from, by name: Inception, classifiers, DINOv2, CLIP."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.files import file_checksum, weight_files
from ..models.noisy_classifier import NoisyClassifier
from ..pipelines.hub_download import fetch
from .embeddings import KINDS, EmbeddingFeatures
from .features import (
    FeatureExtractor,
    ImageFeatures,
    PixelFeatures,
    best_device,
    first_channels,
    match_channels,
    tap_input,
    tap_output,
)

CLASSIFIER, CONFIG = "classifier", "config.json"


def load_features(name: str, *, weights: str | Path | None = None) -> FeatureExtractor:
    """The extractor of a name.

    Args:
        name: "inception"; "classifier:" and the folder or Hub id of a [`NoisyClassifier`] or of any image classifier
            of transformers; "dinov2:" or "clip:" and the folder or Hub id of one; or "pixels", without any network.
        weights: file of Inception's weights; by default torch's cache, into which they are downloaded.

    Raises:
        ValueError: for another name, or a network that is not there.
    """
    if name == "inception":
        from .inception import InceptionFeatures

        return InceptionFeatures(weights)
    kind, colon, source = name.partition(":")
    if weights is not None or (name != "pixels" and not (colon and kind in (CLASSIFIER, *KINDS))):
        raise ValueError(
            f'`features` must be "inception", with `weights` or without, "classifier:", "dinov2:" or "clip:" and a '
            f'folder or Hub id, or "pixels", got {name!r}{"" if weights is None else " with weights"}.'
        )
    if name == "pixels":
        return PixelFeatures()
    folder = _download(source)
    if kind in KINDS:
        return EmbeddingFeatures(kind, folder, name)
    config = json.loads((folder / CONFIG).read_text())
    if config.get("_class_name") == NoisyClassifier.__name__:
        return NoisyClassifierFeatures(folder, name)
    return TransformersFeatures(folder, name)


class _Recording(NoisyClassifier):
    """Keeps the features it classifies, so that one pass gives features and probabilities."""

    def features(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        self.pooled = super().features(sample, timestep)
        return self.pooled


class NoisyClassifierFeatures:
    """Features of a [`NoisyClassifier`] of clean images, at timestep 0; spatial ones from its last map.

    Args:
        folder: of the classifier.
        name: for reports.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.model = _Recording.from_pretrained(folder, torch_dtype=torch.float32).eval().to(best_device())
        self.maps = tap_output(self.model.middle_block[-1])
        self.provenance = {"name": name, "weights_sha256": file_checksum(folder), "resize": "none"}

    def __call__(self, images: Tensor) -> ImageFeatures:
        config = self.model.config
        if images.shape[2:] != (config.sample_size, config.sample_size):
            raise ValueError(
                f"Images must have the classifier's {config.sample_size} by {config.sample_size} pixels, got "
                f"{images.shape[2]} by {images.shape[3]}; resize them, or take another classifier."
            )
        x0 = match_channels(images, config.in_channels).to(self.model.device) / 127.5 - 1
        probs = self.model(x0, 0).logits.softmax(dim=-1)
        return ImageFeatures(self.model.pooled, probs, first_channels(self.maps.pop()))


class TransformersFeatures:
    """Features of an image classifier of transformers: what its last linear layer classifies. No spatial ones.

    Args:
        folder: of the classifier, with its image processor.
        name: for reports.

    Raises:
        ValueError: when it is no image classifier that can be loaded.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            self.processor = AutoImageProcessor.from_pretrained(folder)
            model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`features` must name a NoisyClassifier or an image classifier of transformers with its processor, "
                f"got {name!r}: {str(error).strip().splitlines()[0]}"
            ) from error
        self.model = model.eval().to(best_device())
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
        if not linears:
            raise ValueError(f"`features` must have a linear layer of its {model.config.num_labels} classes: {name!r}.")
        self.inputs = tap_input(linears[-1])
        settings = self.processor.to_dict()
        resize = {key: settings.get(key) for key in ("do_resize", "size", "resample", "do_center_crop", "crop_size")}
        self.provenance = {
            "name": name,
            "weights_sha256": file_checksum(folder),
            "resize": json.loads(json.dumps(resize, default=str)),
        }

    def __call__(self, images: Tensor) -> ImageFeatures:
        pixels = match_channels(images, getattr(self.model.config, "num_channels", 3)).permute(0, 2, 3, 1).numpy()
        batch = self.processor(images=list(pixels), return_tensors="pt", input_data_format="channels_last")
        logits = self.model(batch["pixel_values"].to(self.model.device)).logits
        return ImageFeatures(self.inputs.pop(), logits.softmax(dim=-1))


def _download(name: str) -> Path:
    """The folder of a local or published model.

    Raises:
        ValueError: when it is not there.
    """
    folder = Path(name)
    try:
        if not folder.is_dir():
            folder = Path(fetch(name, index=CONFIG))
    except (OSError, ValueError) as error:
        raise ValueError(f"`features` must name a folder or a Hub id, got {name!r}: {error}") from error
    if not (folder / CONFIG).is_file() or not weight_files(folder):
        raise ValueError(f"`features` must name a folder with config.json and weights, got {name!r}.")
    return folder
