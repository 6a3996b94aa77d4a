"""Classifier-guided diffusion: images of the classes asked for, from an unconditional model and a noisy classifier.

Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, section 4. `timesteps` descends from noise to
image; *progress* runs the same way, from 0 at the first step to 1 at the last.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .classifier_free import make_references
from .components import check_components, class_names, config_of, dtype_of, floats_of, join_classifiers, latent_shape
from .conditions import Conditions, labels_of_call, scale_of_call
from .corrector import Corrector, check_corrector_steps
from .counterfactual import (
    MULTIPLES,
    STRENGTHS,
    CounterfactualOutput,
    Inversion,
    check_search,
    check_values,
    search,
)
from .draws import repeat_generators
from .editing import Editing, Pictures, check_edit, read_known, read_pixels
from .guide_checks import check_guide
from .guided_sampling import GuidedSampling
from .hub_mixin import HubMixin
from .inputs import (
    Labels,
    check_batch_size,
    check_choice,
    check_generator,
    check_guidance_interval,
    check_latents,
    check_num_inference_steps,
    label_tensor,
    scale_at,
)
from .optimization import optimize_module
from .outputs import (
    CALLBACK_TENSORS,
    OUTPUT_TYPES,
    GuidedOutput,
    StepCallback,
    check_callback,
    check_finite,
    draws_from_zero,
    images_of,
    latents_of,
)
from .recurrence import Recurrence, check_recurrence
from .several_classifiers import main_classifier
from .steps import scheduler_guides, set_timesteps, step_options
from .training_free import GuidanceAtX0, GuidanceMethod, check_method
from .twisted import Particles, check_num_particles

Scale = float | Tensor
Guide = Callable[[Tensor, Tensor, Tensor], Tensor]


class ClassifierGuidedPipeline(HubMixin, DiffusionPipeline):
    """Samples p(x | y) ∝ p(x) p(y | x)^w with an unconditional diffusion model and a classifier of noisy images.

    Each step uses g = w ∇ log p(y | x_t): as Σ g on the mean of a DDPM step, where the scheduler's `step` takes
    `guidance` (Dhariwal & Nichol 2021, algorithm 1), otherwise as -√(1-ᾱ) g on the predicted noise (algorithm 2), for
    any diffusers scheduler of models that predict noise, x_0 or v. The two agree in the limit of small steps. Annealed
    Langevin dynamics follows the guided score, s + g (Song et al. 2021, section 5).

    Args:
        unet: predicts from (x_t, t), (B, C, H, W); a UNet with class embeddings is given the labels too, as the
            paper's class-conditional models are.
        classifier: [`NoisyClassifier`], any module that maps (x_t, t) to logits (B, K), or several by name, as
            {"kind": …, "style": …}; or a [`CleanClassifier`], which is asked at the predicted x_0. None draws
            unguided, by class where the UNet has class embeddings.
        scheduler: any diffusers scheduler with the noise levels both were trained on; swap it by `from_config`.
        default_guidance_scale: w where a call gives none; by default the classifier's own, its config's
            `guidance_scale`, or 1.
        id2label: names of the classes of a class-conditional UNet; a classifier's own come first.

    Raises:
        ValueError: when the parts were made for other images, classes or noise levels.
    """

    unet: Any
    classifier: Any
    scheduler: Any

    model_cpu_offload_seq = "unet->classifier"
    _optional_components: ClassVar[list[str]] = ["classifier"]
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS

    def __init__(
        self,
        unet: ModelMixin,
        classifier: nn.Module | dict[str, nn.Module] | None,
        scheduler: SchedulerMixin,
        default_guidance_scale: float | None = None,
        id2label: dict | None = None,  # of names by index; typed no further, since JSON makes strings of the keys
    ) -> None:
        super().__init__()
        classifier = join_classifiers(classifier)
        self.register_modules(unet=unet, classifier=classifier, scheduler=scheduler)
        self.register_to_config(default_guidance_scale=default_guidance_scale, id2label=id2label)
        if default_guidance_scale is not None and isinstance(classifier, ModelMixin):
            classifier.register_to_config(guidance_scale=default_guidance_scale)  # the scale belongs to the weights
        self._interrupt = False
        check_components(self.unet, self.classifier, self.scheduler, self.id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
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
        eta: float = 0.0,
        timesteps: Sequence[int] | None = None,
        respacing: str | None = None,
        batch_size: int = 1,
        guide: Guide | None = None,
        method: GuidanceMethod | None = None,
        classifier_free_scale: float = 1.0,
        weak_unet: ModelMixin | None = None,
        autoguidance_scale: float = 1.0,
        corrector_steps: int = 0,
        corrector_accept: bool = False,
        num_particles: int = 1,
        image: Pictures | None = None,
        strength: float | None = None,
        mask_image: Pictures | None = None,
        num_resamples: int = 1,
        jump_length: int = 10,
    ) -> GuidedOutput | tuple[Any]:
        """Draws one image per class label, or unguided images where there are no labels.

        Args:
            class_labels: a class index or name (of `id2label`), a sequence or (B,) tensor of them, or a (B, K) tensor
                of class probabilities; `Both("3", "8")`, `Either(…)` and `Not(…)` stand for a label, too; None draws
                `batch_size` images unguided. For several classifiers, a dictionary of such labels; without one, they
                are those of the first classifier.
            guidance_scale: w ≥ 0: one for all, a (B,) tensor, or a function of progress (0 at the first step, 1 at the
                last) that gives either. 0 is off: the classifier is not run. Default: `default_guidance_scale`. For
                several classifiers, a dictionary of numbers or (B,) tensors, or one of these for all.
            num_inference_steps: model calls (of schedulers of first order).
            generator: source of all noise; a list of one per image makes each image independent of its batch.
            guidance_interval: (start, end), the part of the progress that is guided, ends included.
            guidance_mode: "mean_shift", "score_shift", or "auto": the mean where the scheduler can shift it.
            latents: unit normal noise to start from, (B, C, H, W).
            callback_on_step_end: called with (pipeline, step index, timestep, tensors) after each step; returns a
                dictionary, whose `latents`, if any, the next step goes on with. Setting the pipeline's `_interrupt`
                ends the sampling.
            callback_on_step_end_tensor_inputs: names of the tensors it is given: "latents", which the step gave;
                "model_input", x_t as the models saw it; "pred_original_sample", the x_0 that the step aimed at.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", x_0 as sampled.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            eta: η of DDIM, from 0, deterministic, to 1, for schedulers whose `step` takes it.
            timesteps: the steps themselves, descending, in place of their number, where the scheduler takes them.
            respacing: OpenAI's "250", "10,15,20" or "ddim25", in place of their number, for hfdiff's DDPMScheduler.
            batch_size: how many images, where there are no labels to count.
            guide: any `f(x_t, t, x_0)` that gives log f of each image, (B,), by torch, of x_t as the models see it, the
                timestep and the predicted x_0; beside the classifier or without. Its strength is its own: the scale is
                the classifier's, the interval is for both.
            method: how the gradient is made, such as `GuidanceMethod.freedom()`; by default [`GuidanceMethod`]'s.
            classifier_free_scale: s of classifier-free guidance, for a class-conditional UNet trained with dropped
                classes; 1 is off. With a classifier, both guide.
            weak_unet: a worse version of the UNet, to guide away from by `autoguidance_scale`.
            autoguidance_scale: s of autoguidance; 1 is off.
            corrector_steps: Langevin steps at each level after the scheduler's, towards the density composed there
                ([`Corrector`]): what makes a product of several labels or guides exact.
            corrector_accept: accept or refuse each of them by Metropolis & Hastings.
            num_particles: K, of each image: sequential Monte Carlo, exact as K grows even where the gradient is wrong
                (Wu et al. 2023, [`Particles`]), for K times the calls. `effective_sample_size` of the output says how
                far guidance alone is from p(x) p(y | x)^w. `latents` is to have K of each image, in a row, and
                callbacks see as many until the last step.
            image: a picture to begin with (SDEdit), one for all or one each: PIL, (B, H, W, C) or (B, C, H, W) in
                [0, 1]. With `latents`, these are the noise on it.
            strength: how much of the sampling is made from the noised picture on, in (0, 1]: less stays nearer to it.
                Progress begins at 1 - strength, so that a noise level is guided alike however it is reached. Default:
                0.8, or 1 with a mask, which begins with noise alone.
            mask_image: of the same kinds, one channel; where it is over 0.5, the image is drawn anew, elsewhere it is
                kept (inpainting). Known pixels are replaced at each step, which is biased; with `num_particles` > 1
                and many small steps it is exact for the unknown ones given the known ones, and the labels if any.
            num_resamples: RePaint's r ≥ 1: every `jump_length` steps are made r times, in r times the calls, so that
                what is drawn fits what is known. It lessens the bias, for any scheduler and number of pixels.
            jump_length: RePaint's j ≥ 1.

        Raises:
            ValueError: for an argument out of its range, before any model runs; for images that are not finite.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        start, end = check_guidance_interval(guidance_interval)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_components(self.unet, self.classifier, self.scheduler, self.id2label)
        guides = self.classifier is not None or guide is not None
        shifts_mean = scheduler_guides(self.scheduler, guidance_mode, guides)
        classes = (self.num_classes, self.id2label)
        labels = labels_of_call(class_labels, guidance_scale, self.unet, self.classifier, *classes)
        labels = None if labels is None else labels.to(self._execution_device)
        count = check_batch_size(batch_size, labels)
        self._guidance_scale = scale_of_call(guidance_scale, labels, self.classifier, self.default_guidance_scale)
        check_generator(generator, count)
        check_guide(guide)
        method = check_method(method, guide, self.classifier)
        check_recurrence(method.recurrence, self.scheduler, num_particles)
        check_corrector_steps(corrector_steps, corrector_accept, self.scheduler, num_particles, mask_image is not None)
        is_weighed = labels is not None or guide is not None or mask_image is not None
        check_num_particles(num_particles, self.scheduler, eta, is_weighed)
        particle_generator = repeat_generators(generator, num_particles)
        edit = self._edit(count, image, strength, mask_image, num_resamples, jump_length, num_particles)
        latents = self._initial_noise(count * num_particles, particle_generator, latents)
        options = step_options(self.scheduler, generator, eta)
        choice = (self._execution_device, num_inference_steps, timesteps, respacing)
        steps = set_timesteps(self.scheduler, *choice)
        progress = torch.linspace(0, 1, len(steps), dtype=torch.float64).tolist()
        scales = [scale_at(point, self._guidance_scale, count) for point in progress]
        active = [start <= point <= end for point in progress]
        scales = [scale if on else 0.0 for on, scale in zip(active, scales)]
        references = make_references(
            self.unet, self.num_classes, classifier_free_scale, weak_unet, autoguidance_scale, active
        )
        path: Sequence[int] = range(len(steps))
        if edit is None:
            latents = latents * self.scheduler.init_noise_sigma
        else:
            again = partial(set_timesteps, self.scheduler, *choice)
            latents, path = edit.begin(self.scheduler, latents, generator, again)
        self._num_timesteps, self._interrupt = len(path), False

        at_x0 = GuidanceAtX0(method, self.scheduler, steps, particle_generator)
        conditions = Conditions(labels, scales, guide, active, references)
        parts = (self.unet, self.classifier, self.scheduler)
        sampling = GuidedSampling(*parts, conditions, at_x0, shifts_mean, options)
        recur = Recurrence(sampling, steps, method.recurrence, generator) if method.recurrence > 1 else None
        correct = None
        if corrector_steps:
            correct = Corrector(sampling, steps, corrector_steps, corrector_accept, generator)
        particles = Particles(sampling, count, num_particles, generator, edit) if num_particles > 1 else None

        for call, i in enumerate(self.progress_bar(path)):
            t = steps[i]
            latents = latents if edit is None else edit.enter(latents, i)
            latents = latents if recur is None else recur(latents, i)
            xt = self.scheduler.scale_model_input(latents, t)
            evaluation = sampling.evaluate(xt, t, i)
            if particles is None:
                step, output = sampling.reverse(evaluation.output, evaluation.gradient, latents, xt, t, i)
            else:
                xt, evaluation = particles.weigh(xt, evaluation, i)
                step, output = particles.propose(evaluation, xt, t, i)
            latents = step.prev_sample
            if correct is not None and i + 1 < len(steps):
                latents = correct(latents, i + 1)
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "model_input": xt}
                if "pred_original_sample" in callback_on_step_end_tensor_inputs:
                    tensors["pred_original_sample"] = sampling.predicted_x0(step, output, xt, t, i)
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = latents_of(callback_on_step_end(self, call, t, tensors), latents, call, t)
            if self._interrupt:
                break

        latents = latents if edit is None else edit.end(latents)
        self.maybe_free_model_hooks()
        check_finite(latents)
        images = images_of(latents, self.unet, output_type)
        if not return_dict:
            return (images,)
        return GuidedOutput(images, None if particles is None else torch.stack(particles.effective_sample_sizes))

    @torch.no_grad()
    def counterfactual(
        self,
        image: Pictures,
        class_labels: Labels,
        strength: float | Sequence[float] = STRENGTHS,
        guidance_scale: float | Sequence[float] | None = None,
        num_inference_steps: int = 20,
        confidence: float = 0.99,
        proximity: float = 0.4,
        output_type: str = "pil",
        return_dict: bool = True,
        return_intermediates: bool = False,
    ) -> CounterfactualOutput | tuple[Any, ...]:
        """Changes pictures as little as the classifier needs to take them for other classes. Nothing random is drawn.

        Each picture is noised by DDIM backwards and denoised again under guidance. Of the values to try, each
        scale's least strength that is accepted is found, and of these images the nearest is kept. So it takes at most
        2 + Σ strengths · scales times `num_inference_steps` calls of the UNet.

        Args:
            image: one for all labels or one each, of the kinds that the call takes.
            class_labels: the class wanted, for all or for each image: indices or names.
            strength: shares of the way to noise to try, in (0, 1].
            guidance_scale: scales w > 0 to try. Default: 1, 2, 4 and 8 times the default scale.
            num_inference_steps: steps of the whole way to noise.
            confidence: the probability from which on the classifier accepts, in (0, 1).
            proximity: λ in [0, 1): each step's x_0 is pulled towards the picture by the fraction λ (1-ᾱ).
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent".
            return_dict: return a [`CounterfactualOutput`] instead of a tuple.
            return_intermediates: return the film, too.

        Raises:
            ValueError: for an argument out of its range, before any model runs.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_components(self.unet, self.classifier, self.scheduler, self.id2label)
        labels = label_tensor(class_labels, self.num_classes, self.id2label).to(self._execution_device)
        check_search(self.classifier, self.scheduler, labels, confidence, proximity)
        strengths = check_values("strength", strength, most=1)
        usual = [multiple * self.default_guidance_scale for multiple in MULTIPLES]
        scales = check_values("guidance_scale", usual if guidance_scale is None else guidance_scale)
        check_num_inference_steps(num_inference_steps, len(self.scheduler.alphas_cumprod))
        count = len(image) if len(labels) == 1 and hasattr(image, "__len__") else len(labels)
        labels, pixels = labels.expand(count), self._pixels(image, count).expand(count, -1, -1, -1)
        inversion = Inversion(pixels, self.scheduler, num_inference_steps, proximity)

        def make_sampling(labels: Tensor, scale: float) -> GuidedSampling:
            scales = [scale] * num_inference_steps
            at_x0 = GuidanceAtX0(GuidanceMethod(), self.scheduler, self.scheduler.timesteps, None)
            return GuidedSampling(self.unet, self.classifier, self.scheduler, Conditions(labels, scales), at_x0)

        nearest, original = search(
            inversion, make_sampling, self.classifier, labels, strengths, scales, confidence, return_intermediates
        )
        self.maybe_free_model_hooks()
        check_finite(nearest.images)
        film = None if nearest.film is None else [images_of(x, self.unet, output_type) for x in nearest.film]
        output = CounterfactualOutput(
            images=images_of(nearest.images, self.unet, output_type),
            l2=nearest.change().norm(dim=1),
            l1=nearest.change().abs().sum(dim=1),
            original_labels=original,
            probabilities=nearest.probabilities,
            strengths=nearest.strengths,
            scales=nearest.scales,
            intermediates=film,
        )
        return output if return_dict else output.to_tuple()

    def optimize(self) -> "ClassifierGuidedPipeline":
        """Makes sampling faster on this machine, and returns the pipeline.

        Both models are frozen and compiled, in bfloat16 where the hardware computes in it; the latents and the
        scheduler stay in float32. The first call for each batch size compiles, which takes up to a minute.
        """
        for module in (self.unet, self.classifier):
            if module is not None:
                optimize_module(module, self._execution_device)
        return self

    # --- what a call is given ----------------------------------------------------------------------------------------

    def _edit(self, count: int, image: Any, strength: Any, mask_image: Any, *resampling: int) -> Editing | None:
        """What a call keeps of an image; None where it is given none."""
        strength = check_edit(self.scheduler, image, strength, mask_image, *resampling)
        if image is None:
            return None
        pixels, known = self._pixels(image, count), None
        if mask_image is not None:
            known = read_known(mask_image, latent_shape(self.unet, count)).to(self._execution_device)
        return Editing(pixels, known, strength, *resampling)

    def _pixels(self, image: Any, count: int) -> Tensor:
        """Pictures as latents, (B or 1, C, H, W)."""
        pixels = read_pixels(image, latent_shape(self.unet, count), draws_from_zero(self.unet))
        return pixels.to(self._execution_device, torch.promote_types(self.dtype, torch.float32))

    def _initial_noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        shape, model_dtype = latent_shape(self.unet, batch_size), self.dtype
        dtype = torch.promote_types(model_dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        check_latents(latents, shape, (dtype, model_dtype))
        return latents.to(self._execution_device, dtype)

    # --- what the components are -------------------------------------------------------------------------------------

    @property
    def default_guidance_scale(self) -> float:
        """w where a call gives none: the pipeline's own, else the classifier's, else 1."""
        scales = (self.config.default_guidance_scale, config_of(self.classifier, "guidance_scale"))
        return next((scale for scale in scales if scale is not None), 1.0)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes: those of the first classifier, else the pipeline's own; empty where they have none."""
        return class_names(main_classifier(self.classifier)) or class_names(self)

    @property
    def num_classes(self) -> int | None:
        """K of the first classifier, or of the UNet; None where neither says."""
        counts = (config_of(main_classifier(self.classifier), "num_classes"), config_of(self.unet, "num_class_embeds"))
        if self.classifier is None and self.config.id2label:
            return len(self.config.id2label)
        return next((count for count in counts if count is not None), None)

    @property
    def guidance_scale(self) -> Scale | Callable[[float], Scale]:
        """w of the call that runs, or of the last one."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs, or of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call that runs is to end after this step."""
        return self._interrupt

    @property
    def device(self) -> torch.device:
        """The UNet's; diffusers asks each component, but a plain module has none."""
        return floats_of(self.unet).device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's."""
        return dtype_of(self.unet)

    def to(self, *args: Any, **kwargs: Any) -> "ClassifierGuidedPipeline":
        """Moves or converts all components, in place; arguments as of `DiffusionPipeline.to`."""
        classifier = self.classifier
        if classifier is None or isinstance(classifier, ModelMixin):
            return super().to(*args, **kwargs)
        self.classifier = None  # diffusers moves modules that say their dtype
        super().to(*args, **kwargs)
        kwargs.pop("silence_dtype_warnings", None)
        self.classifier = classifier.to(*args, **kwargs)
        return self
