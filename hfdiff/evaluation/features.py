"""Networks that turn images into features, each with a record of what it is.

An extractor maps bytes (B, C, H, W), as they are stored, to [`ImageFeatures`], and resizes and scales them as its
network wants. Channels are changed only where nothing is lost; sizes only by a network's own preprocessing.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ..data.files import file_checksum
from ..models.noisy_classifier import NoisyClassifier

SPATIAL_CHANNELS = 7  # of a map, as guided-diffusion's evaluator takes them for sFID
CLASSIFIER = "classifier:"


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


def load_features(name: str, *, weights: str | Path | None = None) -> FeatureExtractor:
    """The extractor of a name.

    Args:
        name: "inception", or "classifier:" and the folder or Hub id of a [`NoisyClassifier`] or of any image classifier
            of transformers.
        weights: file of Inception's weights; by default torch's cache, into which they are downloaded.

    Raises:
        ValueError: for another name, or a network that is not there.
    """
    if name == "inception":
        from .inception import InceptionFeatures

        return InceptionFeatures(weights)
    if not name.startswith(CLASSIFIER) or weights is not None:
        raise ValueError(
            f'`features` must be "inception", with `weights` or without, or "{CLASSIFIER}<folder or Hub id>", got '
            f"{name!r}{'' if weights is None else ' with weights'}."
        )
    folder = _download(name.removeprefix(CLASSIFIER))
    config = json.loads((folder / "config.json").read_text())
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


def _download(name: str) -> Path:
    """The folder of a local or published model.

    Raises:
        ValueError: when it is not there.
    """
    folder = Path(name)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the Hub's client has many
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"`features` must name a folder or a Hub id, got {name!r}: {reason}") from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"`features` must name a folder with config.json and safetensors weights, got {name!r}.")
    return folder
