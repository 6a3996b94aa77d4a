"""The Inception network of the published FIDs: TensorFlow's weights and resize, as torch-fidelity has them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.files import file_checksum
from .features import ImageFeatures, best_device, first_channels, match_channels, tap_output

OUTPUTS = ("2048", "logits_unbiased")  # torch-fidelity's names; the published scores leave the bias out


class InceptionFeatures:
    """Inception-v3 of 2015: 2,048 pooled features, 1,008 classes, and the spatial features of guided-diffusion's sFID.

    Those are 7 of the channels after the first branch of the block that TensorFlow calls mixed_6, 17 by 17 positions.

    Args:
        weights: torch-fidelity's file of weights; by default that of torch's cache, into which it is downloaded.

    Raises:
        ValueError: when torch-fidelity or the weights are not there, or the file holds others.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        network, url = _load_class()
        path = _cached_weights(url) if weights is None else Path(weights)
        try:
            torch.load(path, weights_only=True, map_location="cpu")  # refuses code, which torch-fidelity would run
            self.model = network("inception", list(OUTPUTS), feature_extractor_weights_path=str(path))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"`weights` must be torch-fidelity's file of {url}, got {str(path)!r}: {reason}"
            ) from error
        self.model.to(best_device())
        self.maps = tap_output(self.model.Mixed_6d.branch1x1)
        self.provenance = {
            "name": "inception",
            "weights_sha256": file_checksum(path),
            "resize": "299 by 299, bilinear as in TensorFlow 1",
        }

    def __call__(self, images: Tensor) -> ImageFeatures:
        pooled, logits = self.model(match_channels(images, 3).to(best_device()))
        return ImageFeatures(pooled, logits.softmax(dim=-1), first_channels(self.maps.pop()))


def _load_class() -> tuple[Any, str]:
    """Torch-fidelity's network, and where its weights are."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f"`inception` needs torch-fidelity and torchvision, got: {error}; `pip install 'hfdiff[eval]'`, or take "
            '"classifier:<folder or Hub id>".'
        ) from error
    return FeatureExtractorInceptionV3, URL_INCEPTION_V3


def _cached_weights(url: str) -> Path:
    """The weights in torch's cache, downloaded if need be; their name ends as their SHA-256 begins."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        checksum = Path(name).stem.rpartition("-")[2]
        torch.hub.download_url_to_file(url, str(path), hash_prefix=checksum)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"`inception` needs its weights: {error}; fetch {url} and give the file as `--weights`, or put it into "
            f"{path.parent}."
        ) from error
    return path
