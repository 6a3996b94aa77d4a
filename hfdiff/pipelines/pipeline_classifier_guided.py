"""Classifier-guided diffusion: images of the classes asked for, from an unconditional model and a noisy classifier.

Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 4. `timesteps` descends from noise to
image; *progress* runs the same way, from 0 at the first step to 1 at the last.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .gaussian import clip_x0_, convert, from_x0, to_x0
from .guidance import classifier_gradient, shift_epsilon
from .hub_mixin import HubMixin
from .inputs import (
    Labels,
    check_choice,
    check_generator,
    check_guidance_interval,
    check_guidance_scale,
    check_latents,
    check_num_inference_steps,
    has_noise_levels,
    label_tensor,
    most_steps,
)
from .optimization import optimize_module
from .outputs import CALLBACK_TENSORS, OUTPUT_TYPES, StepCallback, draws_from_zero, format_images

GUIDANCE_MODES = ("auto", "mean_shift", "score_shift")
SCORE_PREDICTIONS = ("epsilon", "sample", "v_prediction")  # the model outputs a score shift can be made in
VARIANCE_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler")  # those that read a learned variance
OWN_CLIPS = ("clip_sample", "thresholding")  # a scheduler's switches of its own clipping of x_0

Scale = float | Tensor


class ClassifierGuidedPipeline(HubMixin, DiffusionPipeline):
    """Samples p(x | y) ∝ p(x) p(y | x)^w with an unconditional diffusion model and a classifier of noisy images.

    Each step uses g = w ∇ log p(y | x_t): as Σ g on the mean of a DDPM step, where the scheduler's `step` takes
    `guidance` (Dhariwal & Nichol 2021, algorithm 1), otherwise as -√(1-ᾱ) g on the predicted noise (algorithm 2), for
    any diffusers scheduler of models that predict noise, x_0 or v. The two agree in the limit of small steps. Annealed
    Langevin dynamics follows the guided score, s + g (Song et al. 2021, section 5).

    Args:
        unet: predicts from (x_t, t), (B, C, H, W); a UNet with class embeddings is given the labels too, as the
            paper's class-conditional models are.
        classifier: [`NoisyClassifier`], or any module that maps (x_t, t) to logits (B, K).
        scheduler: any diffusers scheduler with the noise levels both were trained on; swap it by `from_config`.
        default_guidance_scale: w where a call gives none.

    Raises:
        ValueError: when the classifier was made for other images or noise levels than the UNet and the scheduler.
    """

    unet: Any
    classifier: Any
    scheduler: Any

    model_cpu_offload_seq = "unet->classifier"
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS

    def __init__(
        self, unet: ModelMixin, classifier: ModelMixin, scheduler: SchedulerMixin, default_guidance_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, classifier=classifier, scheduler=scheduler)
        self.register_to_config(default_guidance_scale=default_guidance_scale)
        self._check_components()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        guidance_scale: Scale | Callable[[float], Scale] | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_mode: str = "auto",
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one image per class label.

        Args:
            class_labels: a class index or name (of the classifier's `id2label`), a sequence or (B,) tensor of them, or
                a (B, K) tensor of class probabilities.
            guidance_scale: w ≥ 0: one for all, a (B,) tensor, or a callable that maps progress in [0, 1] to either.
                0 is off: the classifier is not run. Default: the pipeline's `default_guidance_scale`.
            num_inference_steps: model calls (of schedulers of first order).
            generator: source of all noise; a list of one per image makes each image independent of its batch.
            guidance_interval: (start, end), the part of the progress that is guided, ends included.
            guidance_mode: "mean_shift", "score_shift", or "auto": the mean where the scheduler can shift it.
            latents: unit normal noise to start from, (B, C, H, W).
            callback_on_step_end: called with (pipeline, step index, timestep, tensors) after each step; returns a
                dictionary, whose `latents`, if any, the next step goes on with.
            callback_on_step_end_tensor_inputs: names of the tensors it is given: "latents", which the step gave;
                "model_input", x_t as the models saw it; "pred_original_sample", the x_0 that the step aimed at.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", x_0 as sampled.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: for an argument out of its range, before any model runs.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        start, end = check_guidance_interval(guidance_interval)
        check_num_inference_steps(num_inference_steps, most_steps(self.scheduler))
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, tuple(self._callback_tensor_inputs))
        self._check_components()
        scheduler_guides = self._scheduler_guides(guidance_mode)
        labels = label_tensor(class_labels, _config(self.classifier, "num_classes"), self._id2label).to(self._device)
        self._guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        check_generator(generator, len(labels))
        latents = self._initial_noise(len(labels), generator, latents)

        self.scheduler.set_timesteps(num_inference_steps, device=self._device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        progress = torch.linspace(0, 1, len(timesteps), dtype=torch.float64).tolist()
        for point in progress:
            _scale_at(point, self._guidance_scale, len(labels))
        latents = latents * self.scheduler.init_noise_sigma
        options = {"generator": generator} if "generator" in _parameters(self.scheduler.step) else {}

        for i, t in enumerate(self.progress_bar(timesteps)):
            xt = self.scheduler.scale_model_input(latents, t)
            output = self._predict(xt, t, labels)
            guided = start <= progress[i] <= end
            scale = _scale_at(progress[i], self._guidance_scale, len(labels)) if guided else 0.0
            if isinstance(scale, float) and scale == 0:
                step = self.scheduler.step(output, t, latents, **options)
            else:
                gradient = classifier_gradient(self.classifier, xt, t, labels, scale)
                if scheduler_guides:
                    step = self.scheduler.step(output, t, latents, guidance=gradient, **options)
                else:
                    output = self._shift_score(output, xt, self._alpha_bar(i, t), gradient)
                    with _unclipped(self.scheduler):
                        step = self.scheduler.step(output, t, latents, **options)
            latents = step.prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "model_input": xt}
                if "pred_original_sample" in callback_on_step_end_tensor_inputs:
                    tensors["pred_original_sample"] = self._predicted_x0(step, output, xt, i, t)
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, i, t, tensors).pop("latents", latents)

        self.maybe_free_model_hooks()
        images: Any = latents
        if output_type != "latent":
            images = format_images(latents if draws_from_zero(self.unet) else latents / 2 + 0.5, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def optimize(self) -> "ClassifierGuidedPipeline":
        """Makes sampling faster on this machine, and returns the pipeline.

        Both models are frozen and compiled, in bfloat16 where the hardware computes in it; the latents and the
        scheduler stay in float32. The first call for each batch size compiles, which takes up to a minute.
        """
        for module in (self.unet, self.classifier):
            optimize_module(module, self._device)
        return self

    # --- one step ----------------------------------------------------------------------------------------------------

    def _predict(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The UNet's output in the latents' dtype, without a learned variance that the scheduler would not read."""
        condition = {} if _config(self.unet, "num_class_embeds") is None else {"class_labels": labels}
        output = self.unet(xt.to(_dtype(self.unet)), t, **condition).sample.to(xt.dtype)
        return output if type(self.scheduler).__name__ in VARIANCE_SCHEDULERS else output[:, : xt.shape[1]]

    def _predicted_x0(self, step: Any, output: Tensor, xt: Tensor, index: int, timestep: Tensor) -> Tensor:
        """The x_0 that a step aimed at, which the steps of some schedulers do not tell."""
        x0 = getattr(step, "pred_original_sample", None)
        if x0 is not None:
            return x0
        output, kind = output[:, : xt.shape[1]], self.scheduler.config.prediction_type
        return to_x0(output, xt, self._alpha_bar(index, timestep), kind)

    def _shift_score(self, output: Tensor, xt: Tensor, alpha_bar: float, gradient: Tensor) -> Tensor:
        """Algorithm 2: the model output, of the scheduler's prediction type, with its noise shifted by the gradient.

        As in guided-diffusion, the noise is derived again from the clipped x_0 before the shift, and the shifted x_0 is
        not clipped.
        """
        output, variance = output[:, : xt.shape[1]], output[:, xt.shape[1] :]
        kind = self.scheduler.config.prediction_type
        x0 = clip_x0_(to_x0(output, xt, alpha_bar, kind), self.scheduler.config)
        eps = shift_epsilon(from_x0(x0, xt, alpha_bar, "epsilon"), alpha_bar, gradient)
        return torch.cat([convert(eps, xt, alpha_bar, "epsilon", kind), variance], dim=1)

    def _alpha_bar(self, index: int, timestep: Tensor) -> float:
        """ᾱ of what the model is given at a step.

        A scheduler with `sigmas` has σ = √((1-ᾱ)/ᾱ) for each step, whether it works in x_t or, scaling the model's
        input by √ᾱ, in x_0 + σ ε. The others have ᾱ for each timestep of training.
        """
        scheduler = self.scheduler
        if getattr(scheduler, "sigmas", None) is None:
            return float(scheduler.alphas_cumprod[int(timestep)])
        if getattr(scheduler, "state_in_first_order", True):
            return 1 / (1 + float(scheduler.sigmas[index]) ** 2)
        return float(scheduler.scale_model_input(torch.ones(()), timestep)) ** 2  # between two levels of `sigmas`

    def _initial_noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        size = _config(self.unet, "sample_size")
        size = (size, size) if isinstance(size, int) else tuple(size)
        shape = (batch_size, _config(self.unet, "in_channels"), *size)
        model_dtype = _dtype(self.unet)
        dtype = torch.promote_types(model_dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._device, dtype=dtype)
        check_latents(latents, shape, (dtype, model_dtype))
        return latents.to(self._device, dtype)

    # --- what the components are -------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> Scale | Callable[[float], Scale]:
        """w of the call that runs, or of the last one."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs, or of the last one."""
        return self._num_timesteps

    @property
    def _device(self) -> torch.device:
        return self._execution_device if isinstance(self.unet, ModelMixin) else _reference(self.unet).device

    @property
    def num_classes(self) -> int | None:
        """K."""
        return _config(self.classifier, "num_classes")

    @property
    def default_guidance_scale(self) -> float:
        """w."""
        return self.config.default_guidance_scale

    @property
    def id2label(self) -> dict[int, str]:
        """Names."""
        return self._id2label

    @property
    def _id2label(self) -> dict[int, str]:
        return {int(index): str(name) for index, name in (_config(self.classifier, "id2label") or {}).items()}

    def _scheduler_guides(self, guidance_mode: str) -> bool:
        """Whether this scheduler's `step` follows a guidance mode by itself; if not, its score is shifted here."""
        check_choice("guidance_mode", guidance_mode, GUIDANCE_MODES)
        takes_guidance = "guidance" in _parameters(self.scheduler.step)
        name = type(self.scheduler).__name__
        own_mode = getattr(self.scheduler, "guidance_mode", "mean_shift") if takes_guidance else None
        if own_mode is not None and guidance_mode in ("auto", own_mode):
            return True
        if guidance_mode == "mean_shift":
            raise ValueError(
                f'`guidance_mode` "mean_shift" needs a scheduler whose `step` shifts its mean, got {name}; use '
                '"auto" or "score_shift", or hfdiff.DDPMScheduler.'
            )
        kind = _config(self.scheduler, "prediction_type")
        if kind not in SCORE_PREDICTIONS or not hasattr(self.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"`scheduler` must have noise levels ᾱ and a prediction type among {SCORE_PREDICTIONS} to shift its "
                f"score, got {name} with {kind!r}; use another scheduler."
            )
        return False

    def _check_components(self) -> None:
        """Refuses a classifier made for other images or other noise than the UNet and the scheduler."""
        if None in (self.unet, self.classifier, self.scheduler):
            return
        for name in ("sample_size", "in_channels"):
            ours, theirs = _config(self.unet, name), _config(self.classifier, name)
            if None not in (ours, theirs) and ours != theirs:
                raise ValueError(
                    f"`classifier` must have the UNet's {name}, {ours}, got {theirs}; use a classifier trained on the "
                    "same images."
                )
        schedule = _config(self.classifier, "noise_schedule")
        if schedule is None or not hasattr(self.scheduler, "alphas_cumprod"):
            return
        if not has_noise_levels(self.scheduler, schedule):
            names = {name: _config(self.scheduler, name) for name in schedule}
            raise ValueError(
                f"`classifier` must be trained on the scheduler's noise levels, {names}, got {schedule}; make the "
                "scheduler with `from_config(pipe.scheduler.config)`, or train a classifier for it."
            )


def _scale_at(progress: float, guidance_scale: Any, batch_size: int) -> Scale:
    """The checked scale of a step; a float 0 where no image is guided."""
    scale = guidance_scale(progress) if callable(guidance_scale) else guidance_scale
    scale = check_guidance_scale(scale, batch_size)
    return 0.0 if isinstance(scale, Tensor) and not scale.any() else scale


@contextmanager
def _unclipped(scheduler: Any) -> Iterator[None]:
    """Switches off a scheduler's own clipping of x_0."""
    clips = {name: True for name in OWN_CLIPS if _config(scheduler, name)}
    scheduler.register_to_config(**dict.fromkeys(clips, False))
    try:
        yield
    finally:
        scheduler.register_to_config(**clips)


def _config(component: Any, name: str) -> Any:
    """An entry of a component's config, or None."""
    config = getattr(component, "config", {})
    return config.get(name) if hasattr(config, "get") else getattr(config, name, None)


def _reference(module: nn.Module) -> Tensor:
    """A floating tensor of the module, for its device and dtype."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def _dtype(module: nn.Module) -> torch.dtype:
    return _reference(module).dtype


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)
