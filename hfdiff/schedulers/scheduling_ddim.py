"""The DDIM scheduler: x_{t-1} from the predicted x_0 and its noise (Song et al. 2021, equation 12), as OpenAI's.

Timesteps are indices of the trained chain; larger t is noisier and `timesteps` descends. diffusers' DDIMScheduler steps
by a fixed stride and keeps its levels in float32; this one takes any chain, respaced by OpenAI's rule, too, in float64.
"""

from typing import TYPE_CHECKING

import torch
from diffusers import SchedulerMixin  # noqa: F401, diffusers opens a class of a module that has its base's name
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checks import check_shape
from .gaussian import from_x0, to_x0
from .scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput

if TYPE_CHECKING:
    from .noise import make_betas  # noqa: F401, for diffusers, which fetches the files that this one names


class DDIMScheduler(DDPMScheduler):
    """Denoising diffusion implicit models: x_{t-1} = √ᾱ_{t-1} x_0 + √(1-ᾱ_{t-1}-σ²) ε + σ z, without noise at η = 0.

    References: Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16; Dhariwal & Nichol 2021,
    algorithm 2, for its guidance. ε is derived again from the clipped x_0, as in guided-diffusion. The arguments are
    [`DDPMScheduler`]'s; a learned variance of the model is not read.
    """

    guidance_mode = "score_shift"  # what `step` does with its `guidance`

    def _set_chain(self, chain: list[int], device: str | torch.device | None) -> None:
        super()._set_chain(chain, device)
        alpha_bars = self.alphas_cumprod[chain]
        # The original rounds ᾱ_{t-1} to float32, which shows in 1-ᾱ_{t-1} at the last steps: up to 6e-6 of an image.
        previous = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]]).float()
        self._levels = dict(zip(chain, zip(alpha_bars.tolist(), previous.tolist())))

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step.

        Args:
            model_output: of the config's prediction type; channels beyond the sample's are not read.
            timestep: t of the chain, one for all.
            sample: x_t, (B, C, H, W).
            eta: η ≥ 0, of the noise: σ = η √((1-ᾱ_{t-1})/(1-ᾱ_t)) √(1-ᾱ_t/ᾱ_{t-1}).
            generator: source of z, where η > 0; a list gives one per image.
            variance_noise: z itself, unit normal, instead of a drawn one.
            guidance: g = w ∇ log p(y|x_t), of the sample's shape; the predicted noise is shifted by -√(1-ᾱ_t) g, and
                the x_0 that follows is not clipped again.
            return_dict: return a [`DDPMSchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: for a shape that does not fit, a negative η, or a timestep outside the chain.
        """
        if not eta >= 0:
            raise ValueError(f"`eta` must be at least 0, got {eta}; 0 is free of noise.")
        output = model_output[:, : sample.shape[1]]
        for name, tensor in (("model_output", output), ("variance_noise", variance_noise), ("guidance", guidance)):
            check_shape(name, tensor, sample)
        dtype, xt = sample.dtype, sample.to(torch.promote_types(sample.dtype, torch.float32))
        x0, _ = self._mean(self._coefficients(int(timestep), xt), output.to(xt.dtype), xt)
        alpha_bar, previous = self._levels[int(timestep)]
        eps = from_x0(x0, xt, alpha_bar, "epsilon")
        if guidance is not None:
            eps = eps - (1 - alpha_bar) ** 0.5 * guidance
            x0 = to_x0(eps, xt, alpha_bar, "epsilon")
        sigma = eta * ((1 - previous) / (1 - alpha_bar)) ** 0.5 * (1 - alpha_bar / previous) ** 0.5
        prev = previous**0.5 * x0 + (1 - previous - sigma**2) ** 0.5 * eps
        if sigma:
            if variance_noise is None:
                variance_noise = randn_tensor(xt.shape, generator=generator, device=xt.device, dtype=model_output.dtype)
            prev = prev + sigma * variance_noise
        prev, x0 = prev.to(dtype), x0.to(dtype)
        return DDPMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)
