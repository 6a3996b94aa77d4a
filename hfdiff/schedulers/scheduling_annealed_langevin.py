"""Annealed Langevin dynamics: noise conditional score networks sampled level by level (Song & Ermon 2019, 2020).

x_t = x_0 + σ_t ε, with levels σ_0 = σ_min < ... < σ_{L-1} = σ_max; larger t is noisier and `timesteps` descends. (The
original NCSN numbers its levels the other way.) `timesteps` repeats each level as often as it is updated, so any loop
over `timesteps` samples: one entry is one model call and one `step`.

Every update has one form, x ← x + k (x̂_0 - x) + n z, where x̂_0 = x + σ² s is what the score s says of x_0 (Tweedie's
formula) and z is unit normal; the three samplers differ in the gain k and the noise n alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checks import check_choice, check_shape
from .gaussian import Level, x0_coefficients
from .noise import betas_of, geometric_sigmas, rescale_zero_terminal_snr, solve_step_size

SIGMA_SCHEDULES = ("geometric", "from_betas")
PREDICTION_TYPES = ("score", "epsilon", "sample", "v_prediction")
BETAS = ("trained_betas", "beta_schedule", "num_train_timesteps", "beta_start", "beta_end")
LARGEST_RATIO = 2.0  # of step_size/σ_min²: from there on Langevin dynamics diverges, |1 - ratio| ≥ 1


class Update(NamedTuple):
    """One entry of the loop: x ← x + gain (x̂_0 - x) + noise z at a level; the gain of a corrector is None."""

    timestep: int
    gain: float | None
    noise: float


def langevin_updates(levels: list[int], sigmas: list[float], step_size: float) -> list[Update]:
    """x + α s + √(2α) z with α = step_size σ²/σ_min² (Song & Ermon 2020, algorithm 1; NCSN's text has ε = 2 α).

    Args:
        levels: the timestep of each update, descending.
        sigmas: σ of each.
        step_size: α at the smallest level.
    """
    ratio = step_size / sigmas[-1] ** 2
    return [Update(t, ratio, (2 * ratio) ** 0.5 * sigma) for t, sigma in zip(levels, sigmas)]


def consistent_updates(levels: list[int], sigmas: list[float], step_size: float) -> list[Update]:
    """x + η σ² s + β σ' z with the noise that brings x to the next update's level σ' exactly.

    Consistent annealed sampling (Jolicoeur-Martineau et al. 2021, algorithm 2): the step leaves (1-η) of the noise that
    was there, so β² = 1 - (1-η)² σ²/σ'² with η = step_size/σ_min². Where a level's step is too short to reach the next,
    η is the least that does, 1 - σ'/σ.
    """
    ratio = step_size / sigmas[-1] ** 2
    updates = []
    for t, sigma, following in zip(levels, sigmas, [*sigmas[1:], sigmas[-1]]):
        gain = max(ratio, 1 - following / sigma)
        updates.append(Update(t, gain, max(following**2 - ((1 - gain) * sigma) ** 2, 0.0) ** 0.5))
    return updates


def predictor_corrector_updates(levels: list[int], sigmas: list[float], step_size: float) -> list[Update]:
    """At each level correctors, and at its last update the reverse diffusion to the next (Song et al. 2021, alg. 2).

    The predictor is x + (σ² - σ'²) s + √(σ² - σ'²) z, with σ' = 0 after the smallest level; the corrector's step comes
    from the norms of score and noise, so `step_size` is not used.
    """
    updates = []
    for t, sigma, following in zip(levels, sigmas, [*sigmas[1:], 0.0]):
        if following == sigma:
            updates.append(Update(t, None, 0.0))
        else:
            variance = sigma**2 - following**2
            updates.append(Update(t, variance / sigma**2, variance**0.5))
    return updates


SAMPLINGS: dict[str, Callable[[list[int], list[float], float], list[Update]]] = {
    "langevin": langevin_updates,
    "consistent": consistent_updates,
    "predictor_corrector": predictor_corrector_updates,
}


@dataclass
class AnnealedLangevinSchedulerOutput(BaseOutput):
    """Output of [`AnnealedLangevinScheduler.step`].

    Args:
        prev_sample: the updated sample, (B, C, H, W).
        pred_original_sample: x̂_0 = x + σ² s, the score's prediction of x_0, of the same shape.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class AnnealedLangevinScheduler(SchedulerMixin, ConfigMixin):
    """Langevin dynamics x + α_i s(x, σ_i) + √(2 α_i) z through falling noise levels, α_i = step_size σ_i²/σ_min².

    References: Song & Ermon 2019 (algorithm 1) and 2020 (techniques 1 to 4); Jolicoeur-Martineau et al. 2021
    (consistent sampling); Song et al. 2021 (predictor-corrector).

    A model of the DDPM family samples by it unchanged: `from_config(ddpm.config)` reads σ_t = √((1-ᾱ_t)/ᾱ_t) from the
    betas, scales the model's input by 1/√(1+σ²), and samples consistently unless another `sampling` is given.

    Args:
        num_train_timesteps: L, number of trained levels.
        sigma_min: the smallest level sampled, in data units.
        sigma_max: the largest.
        sigma_schedule: geometric, between the two, or from_betas: the levels of a DDPM, of which those between the two
            are sampled.
        steps_per_level: updates per level.
        step_size: α at the smallest level; solved for the levels sampled where it is not given
            ([`~hfdiff.schedulers.noise.solve_step_size`]). It must be under 2 σ_min², from where on it diverges.
        denoise_final: end with a step free of noise, x + σ_min² s (Jolicoeur-Martineau et al. 2021, section 3.1), a
            model call of its own, but for predictor_corrector, whose last predictor it is.
        sampling: langevin, consistent or predictor_corrector.
        snr: r of the corrector's step 2 (r ‖z‖/‖s‖)² (Song et al. 2021, algorithm 4). The norms are averaged over the
            batch, as in the original, or are each image's own where `step` has a generator for each.
        prediction_type: what the model predicts: score, epsilon, sample (x_0) or v_prediction. v is that of the
            model's scaled input, √ᾱ ε - √(1-ᾱ) x_0 with ᾱ = 1/(1+σ²).
        scale_input: the model is given x_t/√(1+σ²), whose variance is near 1 at every level, as suits a UNet that was
            not made for score matching; always so for from_betas.
        beta_start: of from_betas, as the following two, in the sense of [`~hfdiff.schedulers.noise.make_betas`].
        beta_end: β_{T-1}.
        beta_schedule: a name of it.
        trained_betas: betas to use instead, (L,).

    Raises:
        ValueError: for levels or a step size out of their range, or an unknown schedule, sampling or prediction type.
    """

    order = 1
    guidance_mode = "score_shift"  # what `step` does with its `guidance`

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 10,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        sigma_schedule: str = "geometric",
        steps_per_level: int = 5,
        step_size: float | None = None,
        denoise_final: bool = True,
        sampling: str = "langevin",
        snr: float = 0.16,
        prediction_type: str = "score",
        scale_input: bool = False,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
    ) -> None:
        check_choice("sigma_schedule", sigma_schedule, SIGMA_SCHEDULES)
        check_choice("sampling", sampling, tuple(SAMPLINGS))
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if not isinstance(steps_per_level, int) or steps_per_level < 1:
            raise ValueError(f"`steps_per_level` must be an integer of at least 1, got {steps_per_level!r}.")
        if step_size is not None and not step_size > 0:
            raise ValueError(f"`step_size` must be positive, got {step_size}; leave it out to have it solved for.")
        if sigma_schedule == "geometric":
            sigmas = geometric_sigmas(sigma_min, sigma_max, num_train_timesteps)
        else:
            self.betas = betas_of(*(self.config[name] for name in BETAS))
            alpha_bar = torch.cumprod(1 - self.betas, dim=0)
            sigmas = ((1 - alpha_bar) / alpha_bar) ** 0.5
        self.sigmas = sigmas
        self._sampled = self._levels_between(sigma_min, sigma_max)
        self._set_loop(self._sampled, len(self._sampled) * steps_per_level, device=None)
        self.num_inference_steps: int | None = None  # as in diffusers, until `set_timesteps`

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes a scheduler from the config of another of its kind, or of one with betas, such as a DDPM's."""
        if "sigma_schedule" in {**config, **kwargs} or "beta_schedule" not in config:
            return super().from_config(config, return_unused_kwargs, **kwargs)
        # Another scheduler's defaults are not ones of this class: read them, too.
        names = cls._get_init_keys(cls)
        own = {name: value for name, value in config.items() if name in names and value is not None}
        if config.get("rescale_betas_zero_snr"):
            own["trained_betas"] = rescale_zero_terminal_snr(betas_of(*(config.get(name) for name in BETAS))).tolist()
        kwargs["sigma_schedule"] = "from_betas"
        if "sampling" not in own:
            kwargs.setdefault("sampling", "consistent")  # 250 calls, 100 digits: FID 1.5, Langevin 5.5
        made = super().from_config(own, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        scheduler.register_to_config(  # for the way back
            **{name: value for name, value in config.items() if name not in names and not name.startswith("_")}
        )
        return made

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [cls]  # levels in σ alone are not a config that the schedulers with betas can take

    def __len__(self) -> int:
        return len(self.sigmas)

    # --- the levels and the loop -------------------------------------------------------------------------------------

    def _levels_between(self, sigma_min: float, sigma_max: float) -> list[int]:
        """The timesteps of the levels in a range of σ, ascending; all of a geometric schedule."""
        tolerance = 1e-6  # of float32 configs
        inside = (self.sigmas >= sigma_min * (1 - tolerance)) & (self.sigmas <= sigma_max * (1 + tolerance))
        levels = inside.nonzero().flatten().tolist()
        if len(levels) < 2:
            raise ValueError(
                f"`sigma_min` and `sigma_max` must have two levels between them, got {sigma_min} and {sigma_max} for "
                f"levels from {float(self.sigmas[0]):.4g} to {float(self.sigmas[-1]):.4g}; widen the range."
            )
        return levels

    @property
    def _denoise_calls(self) -> int:
        """Model calls after the last update."""
        return int(self.config.denoise_final and self.config.sampling != "predictor_corrector")

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Chooses the levels and how often each is updated.

        Args:
            num_inference_steps: model calls in all, the denoising one included. Where they are fewer than all levels
                take, levels are left out, those that stay nearest to a geometric schedule; where they are more, each
                level gets more; what is left over goes to the smallest levels. Default: every level,
                `steps_per_level` times.
            device: where `timesteps` is kept.

        Raises:
            ValueError: for too few calls to visit two levels, or a step size that diverges.
        """
        steps_per_level, trained = self.config.steps_per_level, len(self._sampled)
        if num_inference_steps is None:
            self._set_loop(self._sampled, trained * steps_per_level, device)
            return
        updates = num_inference_steps - self._denoise_calls
        if updates < 2 * steps_per_level:
            raise ValueError(
                f"`num_inference_steps` must be at least {2 * steps_per_level + self._denoise_calls}, for two levels "
                f"of {steps_per_level} updates and {self._denoise_calls} to denoise, got {num_inference_steps}; give "
                "more or lower `steps_per_level`."
            )
        self._set_loop(self._spread(min(trained, updates // steps_per_level)), updates, device)

    def _spread(self, count: int) -> list[int]:
        """About `count` of the sampled levels with the most even ratios, both ends among them; timesteps, ascending."""
        levels = torch.tensor(self._sampled)
        logs = self.sigmas[levels].log()
        wanted = torch.linspace(float(logs[0]), float(logs[-1]), count, dtype=torch.float64)
        nearest = (logs[None] - wanted[:, None]).abs().argmin(dim=1)
        return levels[nearest.unique()].tolist()

    def _set_loop(self, levels: list[int], updates: int, device: str | torch.device | None) -> None:
        """Computes every update of a loop over ascending levels, and the noise-free one at its end."""
        each, extra = divmod(updates, len(levels))
        loop = [t for i, t in reversed(list(enumerate(levels))) for _ in range(each + (i < extra))]
        step_size = self.config.step_size
        if step_size is None:
            step_size = solve_step_size(self.sigmas[levels], each)
        smallest = float(self.sigmas[levels[0]])
        if step_size >= LARGEST_RATIO * smallest**2:
            raise ValueError(
                f"`step_size` must be under 2 σ_min² = {LARGEST_RATIO * smallest**2:.4g}, from where on Langevin "
                f"dynamics diverges, got {step_size}; lower it, or leave it out to have it solved for."
            )
        self._updates = SAMPLINGS[self.config.sampling](loop, self.sigmas[loop].tolist(), step_size)
        if self._denoise_calls:
            self._updates.append(Update(levels[0], 1.0, 0.0))
        elif self.config.denoise_final:
            self._updates[-1] = self._updates[-1]._replace(noise=0.0)
        self.step_sizes = step_size * (self.sigmas[levels] / smallest) ** 2
        self.init_noise_sigma = self._marginal_scale(self.sigmas[levels[-1]])
        self.num_inference_steps = len(self._updates)
        self.timesteps = torch.tensor([update.timestep for update in self._updates], device=device)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _marginal_scale(self, sigma: Tensor) -> float:
        """Standard deviation of the noise to start from: σ, or √(1 + σ²) for a DDPM, whose input has unit variance."""
        return float(sigma) if self.config.sigma_schedule == "geometric" else float((1 + sigma**2) ** 0.5)

    # --- where the loop is -------------------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """The update that `step` makes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The update a loop begins with, for pipelines that begin in the middle; None is the first of a timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the update a loop begins with."""
        self._begin_index = begin_index

    def _current_index(self, timestep: int | Tensor) -> int:
        """The index of the update at a timestep of the loop: the next one where that fits, else the level's first."""
        t, index = int(timestep), self._begin_index if self._step_index is None else self._step_index
        if index is not None and index < len(self._updates) and self._updates[index].timestep == t:
            return index
        for position, update in enumerate(self._updates):
            if update.timestep == t:
                return position
        raise ValueError(
            f"`timestep` must be one of `scheduler.timesteps`, got {t}; iterate over them, or call `set_timesteps`."
        )

    # --- the forward process -----------------------------------------------------------------------------------------

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ = 1/(1+σ²), (L,), float64: that of the variance-preserving process x_t/√(1+σ²)."""
        return 1 / (1 + self.sigmas**2)

    @property
    def scales_input(self) -> bool:
        """Whether the model is given x_t/√(1+σ²), the variance-preserving form of x_t."""
        return self.config.scale_input or self.config.sigma_schedule == "from_betas"

    def _sigma(self, timestep: int | Tensor, sample: Tensor) -> Level:
        """σ_t: a float for one timestep, (B, 1, 1, 1) for one per image."""
        if not isinstance(timestep, Tensor) or timestep.ndim == 0:
            return float(self.sigmas[int(timestep)])
        sigma = self.sigmas.to(sample.device, torch.promote_types(sample.dtype, torch.float32))[timestep]
        return sigma.reshape(-1, *[1] * (sample.ndim - 1))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 + σ_t ε.

        Args:
            original_samples: x_0, (B, C, H, W).
            noise: ε, unit normal, of the same shape.
            timesteps: t, (B,) or one for all.
        """
        sigma = self._sigma(timesteps.to(original_samples.device), original_samples)
        return (original_samples + sigma * noise).to(original_samples.dtype)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor) -> Tensor:
        """What the model sees of x_t: x_t itself, or x_t/√(1+σ²) where the config's `scale_input` says so.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: t, one for all or (B,).
        """
        if not self.scales_input:
            return sample
        return (sample / (1 + self._sigma(timestep, sample) ** 2) ** 0.5).to(sample.dtype)

    # --- the reverse process -----------------------------------------------------------------------------------------

    def score(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor:
        """s = ∇ log p(x_t), which a model's output stands for, (B, C, H, W).

        Args:
            model_output: of the config's prediction type, (B, C, H, W).
            timestep: t, one for all or (B,).
            sample: x_t, (B, C, H, W), not scaled.
        """
        sigma = self._sigma(timestep, sample)
        return self._pull(model_output, sample, sigma) / sigma**2

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> AnnealedLangevinSchedulerOutput | tuple[Tensor, Tensor]:
        """One update of the loop.

        Args:
            model_output: (B, C, H, W), of the config's prediction type.
            timestep: t of the loop.
            sample: x_t, (B, C, H, W).
            generator: source of z; a list gives one per image.
            variance_noise: z itself, unit normal, instead of a drawn one.
            guidance: g = w ∇ log p(y | x_t) with respect to the model's input, of the sample's shape: the update is
                made with the score of p(x_t) p(y | x_t)^w. It does not change `pred_original_sample`.
            return_dict: return an [`AnnealedLangevinSchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: for a shape that does not fit, or a timestep outside the loop.
        """
        check_shape("model_output", model_output, sample)
        check_shape("variance_noise", variance_noise, sample)
        check_shape("guidance", guidance, sample)
        index = self._current_index(timestep)
        update, dtype = self._updates[index], sample.dtype
        xt, output = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (sample, model_output))
        sigma = float(self.sigmas[update.timestep])
        pull = self._pull(output, xt, sigma)
        x0 = (xt + pull).to(dtype)
        if guidance is not None:
            pull = pull + sigma**2 * self.scale_model_input(guidance, update.timestep)  # the chain rule's factor, too
        if update.gain is not None and not update.noise:
            prev = xt + update.gain * pull
        else:
            if variance_noise is None:
                variance_noise = randn_tensor(xt.shape, generator=generator, device=xt.device, dtype=xt.dtype)
            gain: Tensor | float = (
                corrector_gain(pull, variance_noise, sigma, self.config.snr, by_image=isinstance(generator, list))
                if update.gain is None
                else update.gain
            )
            scale = (2 * gain) ** 0.5 * sigma if update.gain is None else update.noise
            prev = xt + gain * pull + scale * variance_noise
        self._step_index = index + 1
        prev = prev.to(dtype)
        return AnnealedLangevinSchedulerOutput(prev, x0) if return_dict else (prev, x0)

    def _pull(self, output: Tensor, xt: Tensor, sigma: Level) -> Tensor:
        """x̂_0 - x_t = σ² s."""
        if self.config.prediction_type == "score" and not self.scales_input:
            return sigma**2 * output
        alpha_bar = 1 / (1 + sigma**2)
        on_xt, on_output = x0_coefficients(self.config.prediction_type, alpha_bar)  # of the model's input √ᾱ x_t
        return (on_xt * alpha_bar**0.5 - 1) * xt + on_output * output


def corrector_gain(pull: Tensor, noise: Tensor, sigma: float, snr: float, *, by_image: bool) -> Tensor:
    """k = α/σ² of α = 2 (r ‖z‖/‖s‖)² (Song et al. 2021, algorithm 4), norms averaged over the batch or (B, 1, 1, 1)."""
    score_norm, noise_norm = (x.flatten(1).norm(dim=1) for x in (pull / sigma**2, noise))
    if not by_image:
        score_norm, noise_norm = score_norm.mean(), noise_norm.mean()
    return (2 * (snr * noise_norm / score_norm) ** 2 / sigma**2).reshape(-1, *[1] * (pull.ndim - 1))
