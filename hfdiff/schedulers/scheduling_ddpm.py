"""The DDPM scheduler: ancestral sampling from p(x_{t-1} | x_t) = N(μ_t, Σ_t) (Ho et al. 2020, algorithm 2).

Timesteps are indices of the trained chain; larger t is noisier and `timesteps` descends. Coefficients are computed in
float64 once per `set_timesteps` and read by `step`, which neither copies them from a device nor computes with them.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checks import LEARNED_VARIANCES, check_choice, check_shape
from .gaussian import clip_x0_, posterior, x0_coefficients
from .noise import betas_of, rescale_zero_terminal_snr, space_timesteps

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCES)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "prev_sample")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
MIN_VARIANCE = 1e-20  # under a logarithm only, for a chain of a single step


class StepCoefficients(NamedTuple):
    """What one reverse step needs: floats for one timestep, or tensors (B, 1, ..., 1) for a batch of them."""

    xt_to_x0: float | Tensor  # x_0 = xt_to_x0 · x_t + output_to_x0 · model output
    output_to_x0: float | Tensor
    x0_to_mean: float | Tensor  # μ = x0_to_mean · x_0 + xt_to_mean · x_t
    xt_to_mean: float | Tensor
    variance: float | Tensor  # of the fixed types
    log_variance: float | Tensor
    posterior_variance: float | Tensor
    min_log_variance: float | Tensor  # the interval of the learned_range type
    max_log_variance: float | Tensor
    noise_scale: float | Tensor  # standard deviation of the fixed types' noise, 0 at the last step
    is_noisy: float | Tensor  # 1, and 0 at the last step


@dataclass
class DDPMSchedulerOutput(BaseOutput):
    """Output of [`DDPMScheduler.step`].

    Args:
        prev_sample: x_{t-1}, shape of the sample.
        pred_original_sample: the prediction of x_0 the step used, clipped where the config says so; never guided.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None

    def __post_init__(self) -> None:
        # BaseOutput's own finds the fields anew and takes 9 of the 150 µs of a step of 16×1×32².
        for name, value in vars(self).items():
            if value is not None:
                OrderedDict.__setitem__(self, name, value)


@dataclass
class PMeanVariance(BaseOutput):
    """The Gaussian p(x_{t-1} | x_t).

    Args:
        mean: μ_t, shape of the sample.
        variance: Σ_t, which broadcasts against the sample (full shape where it is learned).
        log_variance: its logarithm; at the last step of fixed_small, where Σ = 0, that of the step before it.
        pred_original_sample: the prediction of x_0, shape of the sample.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_original_sample: Tensor


class DDPMScheduler(SchedulerMixin, ConfigMixin):
    """Denoising diffusion probabilistic models: x_{t-1} = μ_t + Σ_t g + Σ_t^{1/2} z, with g the guidance, if any.

    References: Ho et al. 2020 (algorithm 2); Nichol & Dhariwal 2021 (learned variances, respacing); Dhariwal & Nichol
    2021 (algorithm 1, guidance). Config keys and defaults are those of diffusers' DDPMScheduler, so `from_config` works
    in both directions.

    Differs from diffusers: schedules are float64; the variance at the last step is OpenAI's (fixed_large and
    learned_range use the posterior variance of the step before, not β_0 and 1e-20); the last step of a chain is free of
    noise wherever it lies; fixed_large_log is a variance, not its logarithm.

    Args:
        num_train_timesteps: T, length of the trained chain.
        beta_start: β_0.
        beta_end: β_{T-1}.
        beta_schedule: a name of [`~hfdiff.schedulers.noise.make_betas`].
        trained_betas: betas to use instead, (T,).
        variance_type: fixed_small (the posterior's), fixed_large (β_t), their _log forms (the same), learned (the
            model's second half of channels is log Σ) or learned_range (it interpolates between the two, in [-1, 1]).
        clip_sample: clip the prediction of x_0 to ±`clip_sample_range`.
        prediction_type: what the model predicts: epsilon, sample (x_0), v_prediction or prev_sample (μ_t).
        thresholding: dynamic thresholding of x_0 (Saharia et al. 2022, section 2.3) instead of clipping.
        dynamic_thresholding_ratio: its percentile, in [0, 1].
        clip_sample_range: largest magnitude of a clipped x_0.
        sample_max_value: largest threshold of dynamic thresholding.
        timestep_spacing: linspace, leading or trailing (Lin et al. 2024, table 2), for `num_inference_steps`.
        steps_offset: added to the timesteps of leading spacing.
        rescale_betas_zero_snr: rescale the betas to ᾱ_{T-1} = 0.
        respacing: what `set_timesteps` takes where it is given nothing. Its rule, OpenAI's, also spaces other numbers
            of steps, in place of `timestep_spacing`.

    Raises:
        ValueError: for an unknown beta schedule, variance type, prediction type or spacing.
    """

    _compatibles: ClassVar[list[str]] = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    guidance_mode = "mean_shift"  # what `step` does with its `guidance`

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        respacing: str | None = None,
    ) -> None:
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        betas = betas_of(trained_betas, beta_schedule, num_train_timesteps, beta_start, beta_end)
        self.betas = rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.init_noise_sigma = 1.0
        self._set_chain(list(range(len(betas))), device=None)
        self.num_inference_steps: int | None = None  # as in diffusers, until `set_timesteps`

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        # diffusers stands a dummy in for a scheduler whose dependency is missing
        return [cls, *(other for other in super()._get_compatibles() if issubclass(other, SchedulerMixin))]

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    # --- the chain ---------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        respacing: str | Sequence[int] | None = None,
    ) -> None:
        """Chooses the timesteps of the reverse chain and computes its coefficients. Give exactly one of the three.

        With a `respacing` in the config, that is what none of the three means.

        Args:
            num_inference_steps: how many, spaced by the config's `timestep_spacing`.
            device: where `timesteps` is kept.
            timesteps: the timesteps themselves, descending.
            respacing: "250", "10,15,20" or "ddim25", by OpenAI's rule
                ([`~hfdiff.schedulers.noise.space_timesteps`]).

        Raises:
            ValueError: when not exactly one is given, or it does not fit the trained chain.
        """
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "respacing": respacing}
        names = [name for name, value in given.items() if value is not None]
        if not names and self.config.respacing is not None:
            names, respacing = ["respacing"], self.config.respacing
        if len(names) != 1:
            raise ValueError(
                "Expected exactly one of `num_inference_steps`, `timesteps` and `respacing`, got "
                f"{names or 'none'}; leave out the others."
            )
        if num_inference_steps is not None:
            chain = self._spaced(num_inference_steps)
        elif respacing is not None:
            chain = space_timesteps(len(self), respacing)
        else:
            chain = [int(t) for t in timesteps or ()][::-1]
        if not chain or chain[0] < 0 or chain[-1] >= len(self) or any(a >= b for a, b in itertools.pairwise(chain)):
            raise ValueError(
                f"`{names[0]}` must give descending timesteps between {len(self) - 1} and 0, got {chain[::-1]}; "
                "check the order, `steps_offset` and the trained chain's length."
            )
        self._set_chain(chain, device)

    def _spaced(self, count: int) -> list[int]:
        """Ascending timesteps by diffusers' three spacings."""
        total = len(self)
        if not 1 <= count <= total:
            raise ValueError(f"`num_inference_steps` must be between 1 and the {total} trained timesteps, got {count}.")
        if self.config.respacing is not None:
            return space_timesteps(total, _respaced(self.config.respacing, count))
        if self.config.timestep_spacing == "linspace":
            return torch.linspace(0, total - 1, count, dtype=torch.float64).round().long().tolist()
        if self.config.timestep_spacing == "leading":
            return [index * (total // count) + self.config.steps_offset for index in range(count)]
        positions = torch.arange(count, dtype=torch.float64) * (total / count)
        return ((total - positions).round().long() - 1).flip(0).tolist()

    def _set_chain(self, chain: list[int], device: str | torch.device | None) -> None:
        """Computes the coefficients of an ascending chain of timesteps."""
        rows = self._chain_coefficients(self.alphas_cumprod[chain])
        self._by_timestep = {t: StepCoefficients(*row) for t, row in zip(chain, rows.T.tolist())}
        # The same numbers for timesteps in tensors; a timestep outside the chain reads NaN.
        self._table = rows.new_full((len(rows), len(self)), torch.nan)
        self._table[:, chain] = rows
        self._tables: dict[Any, Tensor] = {}
        self.num_inference_steps = len(chain)
        self.timesteps = torch.tensor(chain[::-1], device=device)

    def _chain_coefficients(self, alpha_bar: Tensor) -> Tensor:
        """A row for each of `StepCoefficients`, a column for each ᾱ of the ascending chain."""
        steps = posterior(alpha_bar, torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]))
        # OpenAI's value at the last step, where the posterior variance is 0: that of the step before it.
        clipped = torch.cat([steps.variance[1:2], steps.variance[1:]]) if len(alpha_bar) > 1 else steps.variance
        clipped = clipped.clamp(min=MIN_VARIANCE)
        if self.config.variance_type.startswith("fixed_large"):
            variance = torch.cat([clipped[:1], steps.beta[1:]])
            log_variance = variance.log()
        else:
            variance, log_variance = steps.variance, clipped.log()
        to_x0: tuple[float | Tensor, float | Tensor]
        if self.config.prediction_type == "prev_sample":
            to_x0 = (-steps.on_xt / steps.on_x0, 1 / steps.on_x0)
        else:
            to_x0 = x0_coefficients(self.config.prediction_type, alpha_bar)
        is_noisy = torch.ones_like(alpha_bar)
        is_noisy[0] = 0
        coefficients = StepCoefficients(
            xt_to_x0=to_x0[0],
            output_to_x0=to_x0[1],
            x0_to_mean=steps.on_x0,
            xt_to_mean=steps.on_xt,
            variance=variance,
            log_variance=log_variance,
            posterior_variance=steps.variance,
            min_log_variance=clipped.log(),
            max_log_variance=steps.beta.log(),
            noise_scale=is_noisy * torch.exp(0.5 * log_variance),
            is_noisy=is_noisy,
        )
        return torch.stack([torch.as_tensor(row) for row in coefficients])

    def _coefficients(self, timestep: int | Tensor, like: Tensor) -> StepCoefficients:
        """Floats for a timestep known on the host, tensors read on the device for any other."""
        if not isinstance(timestep, Tensor) or (timestep.ndim == 0 and timestep.device.type == "cpu"):
            try:
                return self._by_timestep[int(timestep)]
            except KeyError:
                raise ValueError(
                    f"`timestep` must be one of `scheduler.timesteps`, got {int(timestep)}; "
                    "iterate over them, or call `set_timesteps` with the timesteps you need."
                ) from None
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self._table.to(like.device, like.dtype)
        values = self._tables[key][:, timestep.to(like.device)]
        return StepCoefficients(*values.reshape(len(values), -1, *[1] * (like.ndim - 1)))

    # --- the forward process -----------------------------------------------------------------------------------------

    def _alpha_bar(self, timestep: int | Tensor, like: Tensor) -> Tensor:
        """ᾱ_t of the trained chain as (B or 1, 1, ..., 1), float64 on the CPU, whatever the inference chain."""
        index = torch.as_tensor(timestep, device=self.alphas_cumprod.device).reshape(-1)
        return self.alphas_cumprod[index].reshape(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, timestep: int | Tensor, noise: Tensor) -> Tensor:
        """Draws from q(x_t | x_0) with the given noise: √ᾱ_t x_0 + √(1-ᾱ_t) ε (Ho et al. 2020, eq. 4).

        Args:
            x0: clean images, (B, C, H, W).
            timestep: t, one for all or (B,).
            noise: ε, unit normal, of the same shape.

        Returns:
            x_t, of the same shape.
        """
        alpha_bar = self._alpha_bar(timestep, x0)
        signal, sigma = (level.to(x0.device, x0.dtype) for level in (alpha_bar**0.5, (1 - alpha_bar) ** 0.5))
        return signal * x0 + sigma * noise

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """[`q_sample`] under diffusers' name and order of arguments."""
        return self.q_sample(original_samples, timesteps, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ ε - √(1-ᾱ) x_0, the target of v_prediction; shapes as in [`q_sample`]."""
        return self.q_sample(noise, timesteps, -sample)

    def q_posterior(self, x0: Tensor, sample: Tensor, timestep: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0), with t-1 the next timestep of the chain.

        Args:
            x0: clean images, (B, C, H, W).
            sample: x_t, of the same shape.
            timestep: t of the chain, one for all or (B,).

        Returns:
            The mean, of the same shape; the variance and its logarithm, (B or 1, 1, 1, 1), the latter clipped at the
            last step to that of the step before it.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        c = self._coefficients(timestep, sample)
        variance, log_variance = (torch.as_tensor(value) for value in (c.posterior_variance, c.min_log_variance))
        return c.x0_to_mean * x0 + c.xt_to_mean * sample, variance, log_variance

    # --- the reverse process -----------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Returns the sample: DDPM's model sees x_t as it is."""
        return sample

    def p_mean_variance(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> PMeanVariance:
        """The Gaussian p(x_{t-1} | x_t) of a model output.

        Args:
            model_output: (B, C, H, W) of the config's prediction type; (B, 2C, H, W) where the variance is learned.
            timestep: t of the chain, one for all or (B,).
            sample: x_t, (B, C, H, W).

        Raises:
            ValueError: for a shape that does not fit, or a timestep outside the chain.
        """
        output, learned = self._split(model_output, sample)
        c = self._coefficients(timestep, sample)
        x0, mean = self._mean(c, output, sample)
        if learned is None:
            variance, log_variance = (torch.as_tensor(v).to(sample) for v in (c.variance, c.log_variance))
        else:
            log_variance = self._learned_log_variance(c, learned)
            variance = log_variance.exp()
        return PMeanVariance(mean=mean, variance=variance, log_variance=log_variance, pred_original_sample=x0)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step, x_{t-1} = μ_t + Σ_t g + Σ_t^{1/2} z; no noise at the last step of the chain.

        Args:
            model_output: (B, C, H, W) of the config's prediction type; (B, 2C, H, W) where the variance is learned.
            timestep: t of the chain; (B,) for a batch at different times.
            sample: x_t, (B, C, H, W).
            generator: source of z; a list gives one per image.
            variance_noise: z itself, unit normal, instead of a drawn one.
            guidance: g = w ∇ log p(y | x_t), of the sample's shape (Dhariwal & Nichol 2021, algorithm 1).
            return_dict: return a [`DDPMSchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: for a shape that does not fit, or a timestep outside the chain.
        """
        output, learned = self._split(model_output, sample)
        check_shape("variance_noise", variance_noise, sample)
        check_shape("guidance", guidance, sample)
        dtype = sample.dtype
        if dtype in (torch.float16, torch.bfloat16):
            sample, output = sample.float(), output.float()
        c = self._coefficients(timestep, sample)
        x0, prev = self._mean(c, output, sample)
        if learned is None:
            variance, scale = c.variance, c.noise_scale
        else:
            log_variance = self._learned_log_variance(c, learned)
            variance, scale = log_variance.exp(), c.is_noisy * torch.exp(0.5 * log_variance)
        if guidance is not None:
            prev = _add_scaled(prev, guidance, variance)
        if not isinstance(c.is_noisy, float) or c.is_noisy:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    output.shape, generator=generator, device=output.device, dtype=model_output.dtype
                )
            prev = _add_scaled(prev, variance_noise, scale)
        if prev.dtype != dtype:
            prev, x0 = prev.to(dtype), x0.to(dtype)
        return DDPMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the learned variance's channels where the variance is learned."""
        channels = sample.shape[1]
        learned = self.config.variance_type in LEARNED_VARIANCES
        expected = (sample.shape[0], channels * (2 if learned else 1), *sample.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"`model_output` must have shape {expected} for samples of shape {tuple(sample.shape)} and "
                f"variance_type={self.config.variance_type!r}, got {tuple(model_output.shape)}."
            )
        if not learned:
            return model_output, None
        output, variance = model_output.split(channels, dim=1)
        return output, variance

    def _mean(self, c: StepCoefficients, output: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """x_0, clipped as the config says, and μ_t."""
        x0 = (c.xt_to_x0 * xt).add_(c.output_to_x0 * output)  # no fused multiply-add: the terms cancel, as OpenAI's do
        x0 = clip_x0_(x0, self.config)
        if self.config.prediction_type == "prev_sample":
            return x0, output.clone()
        return x0, _add_scaled(c.x0_to_mean * x0, xt, c.xt_to_mean)

    def _learned_log_variance(self, c: StepCoefficients, learned: Tensor) -> Tensor:
        """log Σ_t from the model's channels (Nichol & Dhariwal 2021, eq. 15)."""
        if self.config.variance_type == "learned":
            return learned
        fraction = (learned + 1) / 2
        return fraction * c.max_log_variance + (1 - fraction) * c.min_log_variance


def _add_scaled(total: Tensor, term: Tensor, scale: float | Tensor) -> Tensor:
    """total + scale · term, in place for one scale (the tensors here are the step's own)."""
    return total.add_(term, alpha=scale) if isinstance(scale, float) else total.addcmul_(term, scale)


def _respaced(respacing: str, count: int) -> str:
    """A respacing of the same kind with another count."""
    if respacing.startswith("ddim"):
        return f"ddim{count}"
    return respacing if sum(int(part) for part in respacing.split(",")) == count else str(count)
