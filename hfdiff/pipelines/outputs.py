"""What pipelines give back, and whom they call on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from .inputs import check_choice

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


def latents_of(given: Any, latents: Tensor, index: int, timestep: Tensor) -> Tensor:
    """What a callback lets the next step go on with: its `latents`, or those of the last step.

    Args:
        given: which the callback returned.
        latents: of the last step.
        index: of the step.
        timestep: t.

    Raises:
        ValueError: for anything but a dictionary, and for latents of another shape.
    """
    step = f"at step {index} (timestep {float(timestep):g})"
    if not isinstance(given, Mapping):
        raise ValueError(
            f"`callback_on_step_end` must return a dictionary, got {given!r} {step}; return {{}} to change nothing."
        )
    chosen = given.get("latents", latents)
    if not isinstance(chosen, Tensor) or chosen.shape != latents.shape:
        came = tuple(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
        raise ValueError(
            f"`callback_on_step_end` must return `latents` of shape {tuple(latents.shape)}, got {came} {step}; keep "
            "the shape."
        )
    return chosen


def check_callback(callback: Any, tensor_inputs: Sequence[str]) -> None:
    """Refuses a callback that cannot be called, and names of tensors that it cannot be given.

    Raises:
        ValueError: then.
    """
    if callback is not None and not callable(callback):
        raise ValueError(
            "`callback_on_step_end` must be a function of (pipeline, step index, timestep, tensors), got "
            f"{callback!r}; leave it out for none."
        )
    if isinstance(tensor_inputs, str):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be a list of names, got {tensor_inputs!r}; write "
            f"[{tensor_inputs!r}]."
        )
    for name in tensor_inputs:
        check_choice("callback_on_step_end_tensor_inputs", name, tuple(CALLBACK_TENSORS))


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


def images_of(latents: Tensor, model: Any, output_type: str) -> Any:
    """What a pipeline gives for x_0 in the range of its model's data; "latent" is x_0 itself."""
    if output_type == "latent":
        return latents
    return format_images(latents if draws_from_zero(model) else latents / 2 + 0.5, output_type)


def format_images(images: Tensor, output_type: str) -> Any:
    """Images (B, C, H, W), clamped to [0, 1], as "pt", "np" (B, H, W, C) or "pil"."""
    images = images.clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).float().cpu().numpy()
    return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)
