"""Classifiers of clean images, p(y | x_0), as guides: any image classifier of transformers, with its own preprocessing.

Sampling asks them at the predicted x_0. So they know no timestep, and what comes before the network, its size and its
normalisation, is part of the graph.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .noisy_classifier import NoisyClassifier

if TYPE_CHECKING:  # diffusers copies what this file names, and what that imports it does not look for
    from .layers import Blocks  # noqa: F401

CLEAN = 0  # the timestep of a `NoisyClassifier` that classifies clean images
FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # of an image processor's `resample`; others as bicubic
PROCESSING: tuple[str, ...] = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_rescale")
PROCESSING += ("rescale_factor", "do_normalize", "image_mean", "image_std")


@dataclass
class CleanClassifierOutput(BaseOutput):
    """Output of [`CleanClassifier`].

    Args:
        logits: (B, num_classes), unnormalised log p(y | x_0).
    """

    logits: Tensor


class CleanClassifier(ModelMixin, ConfigMixin):
    """log p(y | x_0) of clean images in [-1, 1], which guides at the predicted x_0 without having seen noise.

    Args:
        model: an image classifier of transformers, or the folder or Hub id of one; a [`NoisyClassifier`] of clean
            images, at t = 0, or its folder; or any module that maps x_0 in [-1, 1] to logits (B, K), which is not
            saved. A dictionary is the config of one of the first two, which gets random weights.
        processor: what the images go through first: an image processor of transformers, its folder or Hub id, or its
            settings, such as `{"size": {"height": 224, "width": 224}, "image_mean": [0.5], "image_std": [0.5]}`.
            Default: the one beside the model. Images are resized by torch, with its gradient, and not rounded or
            clipped; grey ones are repeated for a network of colours.
        num_classes: K, where the model does not say.
        id2label: names of the classes, where the model does not say.
        softplus_beta: makes each ReLU of the model a softplus of this β, whose gradient is smooth (Ma et al. 2023,
            "Elucidating the Design Space of Classifier-Guided Diffusion Generation", who take 3); None leaves them.
        guidance_scale: w at which it guides best, a pipeline's default.

    Raises:
        ValueError: for a model that is none of these, or settings that are missing.
    """

    reads_x0 = True  # a guided pipeline asks it at the predicted x_0

    @register_to_config
    def __init__(
        self,
        model: nn.Module | str | os.PathLike | dict[str, Any],
        processor: Any = None,
        num_classes: int | None = None,
        id2label: dict[int, str] | None = None,
        softplus_beta: float | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.network = _open(model)
        config: Any = getattr(self.network, "config", None)
        if isinstance(self.network, NoisyClassifier):
            names, side = self.network.id2label, config.sample_size
            described = {name: value for name, value in config.items() if not name.startswith("_")}
            described = {"_class_name": NoisyClassifier.__name__, **described}
            own = {"size": {"height": side, "width": side}, "image_mean": [0.5], "image_std": [0.5]}
            settings = _settings(own if processor is None else processor)
        elif _is_transformers(self.network):
            names, described = config.id2label, config.to_dict()
            settings = _settings(_beside(model, self.network) if processor is None else processor)
        else:
            names, described = id2label, None
            settings = {} if processor is None else _settings(processor)
        names = {int(index): str(name) for index, name in (names or {}).items()} or None
        count = num_classes if names is None else len(names)
        self.register_to_config(model=described, processor=settings, num_classes=count, id2label=names)
        mean, std = _normalisation(settings)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if softplus_beta is not None:
            _smooth(self.network, softplus_beta)
        self.eval()

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class index; empty where the model has none."""
        return {int(index): str(name) for index, name in (self.config.id2label or {}).items()}

    @property
    def num_channels(self) -> int:
        """The channels that the network takes."""
        config: Any = getattr(self.network, "config", None)
        counts = (getattr(config, name, None) for name in ("num_channels", "in_channels"))
        return next((count for count in counts if count is not None), self.mean.shape[1])

    @property
    def unsaved(self) -> str | None:
        """Why it cannot be saved; None where it can."""
        return (
            None if self.config.model else f"a {type(self.network).__name__}, of which no config tells how to make it"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves weights and config; arguments as of diffusers.

        Raises:
            ValueError: for a module that no config describes.
        """
        if self.unsaved:
            raise ValueError(f"`model` must be a NoisyClassifier or of transformers to be saved, got {self.unsaved}.")
        super().save_pretrained(*args, **kwargs)

    def preprocess(self, sample: Tensor) -> Tensor:
        """Images in [-1, 1], (B, C, H, W), as the network takes them; differentiable."""
        settings = self.config.processor
        images = (sample + 1) / 2
        if settings.get("do_resize", True) and settings.get("size"):
            images = _resize(images, *_target(settings, *images.shape[2:]), settings.get("resample"))
        if settings.get("do_center_crop") and settings.get("crop_size"):
            height, width = _height_width(settings["crop_size"])
            top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
            images = images[:, :, top : top + height, left : left + width]
        images = (images - self.mean) / self.std
        return images.expand(-1, self.num_channels, -1, -1) if images.shape[1] == 1 else images

    def forward(self, sample: Tensor, *, return_dict: bool = True) -> CleanClassifierOutput | tuple[Tensor]:
        """Classifies images.

        Args:
            sample: x_0, in [-1, 1], (B, C, H, W), of any size.
            return_dict: return a [`CleanClassifierOutput`] instead of a tuple.
        """
        pixels = self.preprocess(sample)
        output = self.network(pixels, CLEAN) if isinstance(self.network, NoisyClassifier) else self.network(pixels)
        logits = output if isinstance(output, Tensor) else output.logits
        return CleanClassifierOutput(logits=logits) if return_dict else (logits,)


# --- the network -----------------------------------------------------------------------------------------------------


def _is_transformers(model: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(model).__mro__)


def _open(model: Any) -> nn.Module:
    """The module of a description; a config makes one with random weights, which are to be loaded."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, dict):
        if model.get("_class_name") == NoisyClassifier.__name__:
            return NoisyClassifier.from_config(model)
        from transformers import AutoConfig, AutoModelForImageClassification

        return AutoModelForImageClassification.from_config(AutoConfig.for_model(**model))
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"`model` must be an image classifier or the folder or Hub id of one, got a {type(model).__name__}; open "
            "it with transformers first."
        )
    try:
        if NoisyClassifier.load_config(model).get("_class_name") == NoisyClassifier.__name__:
            return NoisyClassifier.from_pretrained(model)
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"`model` must be the folder or Hub id of an image classifier of transformers or of a NoisyClassifier, got "
            f"{str(model)!r}: {reason}"
        ) from error


def _smooth(model: nn.Module, beta: float) -> None:
    """Replaces each ReLU by log(1 + exp(β x))/β."""
    found = [(parent, name) for parent in model.modules() for name, m in parent.named_children() if _is_relu(m)]
    if not found or not beta > 0:
        raise ValueError(f"`softplus_beta` must be above 0, for a model with ReLUs, got {beta} and {len(found)} ReLUs.")
    for parent, name in found:
        setattr(parent, name, nn.Softplus(beta=beta))


def _is_relu(module: nn.Module) -> bool:
    return type(module).__name__ in ("ReLU", "ReLU6")


# --- what comes before it --------------------------------------------------------------------------------------------


def _beside(model: Any, opened: nn.Module) -> str:
    """Where the processor of a classifier of transformers is to be found."""
    name = model if isinstance(model, str | os.PathLike) else getattr(opened.config, "_name_or_path", "")
    if not name:
        raise ValueError(
            f"`processor` must be given for a {type(opened).__name__} that comes from no folder, got None; give its "
            "image processor, or settings such as {'image_mean': [0.5], 'image_std': [0.5]}."
        )
    return str(name)


def _settings(processor: Any) -> dict[str, Any]:
    """An image processor's settings, those that matter here, in values that JSON knows."""
    if isinstance(processor, str | os.PathLike):
        from transformers import ImageProcessingMixin

        try:
            processor = ImageProcessingMixin.get_image_processor_dict(processor)[0]
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"`processor` must be an image processor, its folder or its settings, got {str(processor)!r}: {reason}"
            ) from error
    elif hasattr(processor, "to_dict"):
        processor = processor.to_dict()
    if not isinstance(processor, dict):
        raise ValueError(f"`processor` must be an image processor or its settings, got a {type(processor).__name__}.")
    settings = {name: processor[name] for name in PROCESSING if processor.get(name) is not None}
    if not isinstance(settings.get("size", 0), int):
        settings["size"] = {name: side for name, side in dict(settings["size"]).items() if side is not None}
    if "resample" in settings:
        settings["resample"] = int(settings["resample"])
    if settings.get("do_normalize", True) and not {"image_mean", "image_std"} <= settings.keys():
        raise ValueError(f"`processor` must have an image_mean and an image_std, got {sorted(settings)}; add them.")
    return settings


def _normalisation(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (1, C, 1, 1), of images in [0, 1]; without settings, those that give [-1, 1]."""
    given = "image_mean" in settings
    mean, std = (settings["image_mean"], settings["image_std"]) if given else ([0.5], [0.5])
    if given and not settings.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    scale = 255 * factor if given else 1.0  # what the processor makes of white
    return _per_channel(mean) / scale, _per_channel(std) / scale


def _per_channel(values: list[float]) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _height_width(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _target(settings: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    """The height and width that images are resized to, before a crop, if any."""
    size = settings["size"]
    if not isinstance(size, int) and "shortest_edge" not in size:
        return _height_width(size)
    edge = size if isinstance(size, int) else size["shortest_edge"]
    if "crop_pct" in settings and edge < 384:  # as ConvNeXT's processor does
        edge = int(edge / settings["crop_pct"])
    return int(height * edge / min(height, width)), int(width * edge / min(height, width))


def _resize(images: Tensor, height: int, width: int, resample: int | None) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    mode = FILTERS.get(2 if resample is None else resample, "bicubic")
    return F.interpolate(images, size=(height, width), mode=mode, antialias=mode != "nearest-exact")
