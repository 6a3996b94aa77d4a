"""Images from a score network by annealed Langevin dynamics: from noise, around given pixels, or between two images.

Song & Ermon 2019 and 2020. `timesteps` descends from the largest noise level to the smallest, each repeated.
"""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .components import latent_shape
from .editing import Pictures, read_known, read_pixels
from .hub_mixin import HubMixin
from .inputs import check_batch_size, check_choice, check_generator, check_integer, check_latents
from .outputs import (
    CALLBACK_TENSORS,
    OUTPUT_TYPES,
    LevelwiseOutput,
    StepCallback,
    check_callback,
    check_finite,
    draws_from_zero,
    images_of,
    latents_of,
)
from .steps import set_timesteps


class NCSNPipeline(HubMixin, DiffusionPipeline):
    """Samples p(x) by Langevin dynamics through falling noise levels, with the score network of each.

    Args:
        unet: the score network: [`NCSNModel`], [`NCSNv2Model`], or a diffusers UNet of any prediction type the
            scheduler knows. Where its config has `rescaled` off, its data are in [0, 1], else in [-1, 1].
        scheduler: [`AnnealedLangevinScheduler`] with the levels it was trained on.
    """

    unet: Any
    scheduler: Any

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if scheduler is not None and not hasattr(scheduler, "step_sizes"):
            raise ValueError(
                f"`scheduler` must sample by annealed Langevin dynamics, got {type(scheduler).__name__}; make one by "
                "`AnnealedLangevinScheduler.from_config(scheduler.config)`."
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
        return_intermediates: bool = False,
    ) -> LevelwiseOutput | tuple[Any, ...]:
        """Draws images; with `image` and `mask_image`, only the masked part of them (inpainting).

        At every level the known pixels are the image's with that level's noise, at the end the image's own (Song &
        Ermon 2019, appendix B.3).

        Args:
            batch_size: how many.
            num_inference_steps: model calls; default: all that the scheduler's levels and steps ask for.
            generator: source of all noise; a list of one per image makes each image independent of its batch.
            image: one image for all or one each: PIL, (B, H, W, C) or (B, C, H, W) in [0, 1].
            mask_image: of the same kinds, one channel; where it is over 0.5, the image is drawn anew.
            latents: unit normal noise to start from, (B, C, H, W).
            callback_on_step_end: called with (pipeline, step index, timestep, tensors) after each step; returns a
                dictionary, whose `latents`, if any, the next step goes on with. It sees every intermediate state.
            callback_on_step_end_tensor_inputs: names of the tensors it is given: "latents", which the step gave;
                "model_input", x_t as the model saw it; "pred_original_sample", the x_0 that the score points at.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", x_0 as sampled.
            return_dict: return a [`LevelwiseOutput`] instead of a tuple.
            return_intermediates: return the images after the last update of each level, too, from noisy to clean.

        Raises:
            ValueError: for an argument out of its range, before any model runs.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_batch_size(batch_size, labels=None)
        check_generator(generator, batch_size)
        known = self._known_pixels(image, mask_image, batch_size)
        latents = self._initial_noise(batch_size, generator, latents)
        timesteps = set_timesteps(self.scheduler, self._execution_device, num_inference_steps)
        self._num_timesteps, self._interrupt = len(timesteps), False
        latents, intermediates = latents * self.scheduler.init_noise_sigma, []
        leaves_level = [*(timesteps[:-1] != timesteps[1:]).tolist(), True]
        for i, t in enumerate(self.progress_bar(timesteps)):
            if known is not None:
                noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
                pixels, kept = known
                latents = torch.where(kept, pixels + self._noise_std(t) * noise, latents)
            xt = self.scheduler.scale_model_input(latents, t)
            step = self.scheduler.step(self._predict(xt, t), t, latents, generator=generator)
            latents = step.prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "model_input": xt, "pred_original_sample": step.pred_original_sample}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = latents_of(callback_on_step_end(self, i, t, tensors), latents, i, t)
            if return_intermediates and leaves_level[i]:
                intermediates.append(images_of(latents, self.unet, output_type))
            if self._interrupt:
                break
        if known is not None:
            pixels, kept = known
            latents = torch.where(kept, pixels, latents)
        self.maybe_free_model_hooks()
        check_finite(latents)
        images = images_of(latents, self.unet, output_type)
        states = intermediates if return_intermediates else None
        if not return_dict:
            return (images,) if states is None else (images, states)
        return LevelwiseOutput(images=images, intermediates=states)

    @torch.no_grad()
    def interpolate(
        self,
        num_images: int = 8,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Images between two samples: every one from its own mixture of the same two streams of noise.

        Image k uses cos θ_k z + sin θ_k z' for the noise of each step, with θ_k from 0 to π/2, which is unit normal for
        each k (Song & Ermon 2020, section 5).

        Args:
            num_images: at least 2, the two samples included.
            num_inference_steps: model calls; default: all that the scheduler's levels and steps ask for.
            generator: source of both streams, or a list of two, one for each.
            output_type: as in the call.

        Returns:
            The images, in order.

        Raises:
            ValueError: for fewer than 2 images, other than 1 or 2 generators, or an unknown output type.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_integer("num_images", num_images, least=2, remedy="two are the ends")
        pair = generator if isinstance(generator, list | tuple) else [generator, generator]
        if len(pair) != 2:
            raise ValueError(
                f"`generator` must be one, or a list of two, one for each end, got {len(pair)}; give one or two."
            )
        check_generator(list(pair), 2)
        timesteps = set_timesteps(self.scheduler, self._execution_device, num_inference_steps)
        theta = torch.linspace(0, torch.pi / 2, num_images, device=self._execution_device).view(-1, 1, 1, 1)

        def mixed() -> Tensor:
            first, second = (self._unit_noise(1, stream) for stream in pair)
            return theta.cos().to(first) * first + theta.sin().to(first) * second

        latents = mixed() * self.scheduler.init_noise_sigma
        for t in self.progress_bar(timesteps):
            output = self._predict(self.scheduler.scale_model_input(latents, t), t)
            latents = self.scheduler.step(output, t, latents, variance_noise=mixed()).prev_sample
        self.maybe_free_model_hooks()
        check_finite(latents)
        return images_of(latents, self.unet, output_type)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _predict(self, xt: Tensor, t: Tensor) -> Tensor:
        """The model's output in the input's dtype."""
        return self.unet(xt.to(self.unet.dtype), t).sample.to(xt.dtype)

    def _noise_std(self, t: Tensor) -> float:
        """σ_t."""
        return float(self.scheduler.sigmas[int(t)])

    def _unit_noise(self, batch_size: int, generator: Any) -> Tensor:
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        return randn_tensor(
            latent_shape(self.unet, batch_size), generator=generator, device=self._execution_device, dtype=dtype
        )

    def _initial_noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        if latents is None:
            return self._unit_noise(batch_size, generator)
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        check_latents(latents, latent_shape(self.unet, batch_size), (dtype, self.unet.dtype))
        return latents.to(self._execution_device, dtype)

    # --- images and data ---------------------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs, or of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call that runs is to end after this step."""
        return self._interrupt

    def _known_pixels(
        self, image: Pictures | None, mask_image: Pictures | None, batch_size: int
    ) -> tuple[Tensor, Tensor] | None:
        """The image in the model's range and where it is known, both (B or 1, C or 1, H, W); None without them."""
        if (image is None) != (mask_image is None):
            missing = "mask_image" if mask_image is None else "image"
            raise ValueError(f"`image` and `mask_image` go together, got no `{missing}`; give both or none.")
        if image is None:
            return None
        pixels = read_pixels(image, latent_shape(self.unet, batch_size), draws_from_zero(self.unet))
        known = read_known(mask_image, latent_shape(self.unet, batch_size))
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        return pixels.to(self._execution_device, dtype), known.to(self._execution_device)
