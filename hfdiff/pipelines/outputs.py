"""What pipelines give back, and whom they call on the way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ["latents", "model_input", "pred_original_sample"]
StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class LevelwiseOutput(ImagePipelineOutput):
    """Output of a pipeline that samples level by level.

    Args:
        images: as `output_type` says.
        intermediates: the images after the last update of each level, from noisy to clean, where they were asked for.
    """

    intermediates: list[Any] | None = None


@dataclass
class GuidedOutput(ImagePipelineOutput):
    """Output of the guided pipeline.

    Args:
        images: as `output_type` says.
        effective_sample_size: of each image's particles at each step, (steps, B), from 1 to K; None without particles.
    """

    effective_sample_size: Tensor | None = None


def draws_from_zero(model: Any) -> bool:
    """Whether a model's data are in [0, 1], as those of a score network with `rescaled` off, instead of [-1, 1]."""
    return getattr(model, "config", {}).get("rescaled") is False


def check_finite(latents: Tensor) -> None:
    """Refuses samples that are no images.

    Raises:
        ValueError: for NaN or infinity.
    """
    if not latents.isfinite().all():
        raise ValueError(
            "The samples are not finite, got NaN or infinity; check the models' weights, their dtype and the guidance "
            "scale."
        )


def format_images(images: Tensor, output_type: str) -> Any:
    """Images (B, C, H, W), clamped to [0, 1], as "pt", "np" (B, H, W, C) or "pil"."""
    images = images.clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).float().cpu().numpy()
    return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)
