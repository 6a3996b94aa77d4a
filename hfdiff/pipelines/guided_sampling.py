"""One sampling of the guided pipeline: what the networks say of x_t, and the step that follows.

Every way of guiding is a part of `evaluate`, which gives the model output and the guidance g; every way of stepping is
a part of `reverse`, which makes x_{t-1} of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .components import config_of, floats_of
from .gaussian import clip_x0_, convert, from_x0, to_x0
from .guidance import classifier_guidance, shift_epsilon
from .steps import alpha_bar_at, unclipped

VARIANCE_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler")  # those that read a learned variance


class Evaluation(NamedTuple):
    """What the networks say of x_t.

    Args:
        output: the model output, of the scheduler's prediction type.
        gradient: the guidance g = w ∇ log p(y | x_t); None where the step is not guided.
        log_prob: w log p(y | x_t), (B,); None there, too.
    """

    output: Tensor
    gradient: Tensor | None = None
    log_prob: Tensor | None = None


class GuidedSampling:
    """The networks, the scheduler and the conditions of one call.

    Args:
        unet: predicts from (x_t, t), and the labels where it has class embeddings.
        classifier: of (x_t, t); None where there is none.
        scheduler: whose timesteps are set.
        labels: of the images; None draws them unguided.
        scales: w of each step: one for all images, or (B,); a float 0 is off.
        shifts_mean: whether the scheduler's `step` follows the guidance by itself.
        options: what else `step` is given.
    """

    def __init__(
        self,
        unet: Any,
        classifier: Any,
        scheduler: Any,
        labels: Tensor | None,
        scales: Sequence[float | Tensor],
        shifts_mean: bool,
        options: dict[str, Any],
    ) -> None:
        self.unet, self.classifier, self.scheduler = unet, classifier, scheduler
        self.labels, self.scales = labels, scales
        self.shifts_mean, self.options = shifts_mean, options

    def evaluate(self, xt: Tensor, timestep: Tensor, index: int) -> Evaluation:
        """The model output at x_t, and the guidance where the step is guided.

        Args:
            xt: x_t as the networks see it, by the scheduler's `scale_model_input`.
            timestep: t.
            index: of the step.
        """
        output, scale = self.predict(xt, timestep), self.scales[index]
        if self.labels is None or (isinstance(scale, float) and scale == 0):
            return Evaluation(output)
        log_prob, gradient = classifier_guidance(self.classifier, xt, timestep, self.labels, scale)
        return Evaluation(output, gradient, log_prob)

    def predict(self, xt: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's output in the dtype of x_t, without a learned variance that the scheduler would not read."""
        condition = {} if config_of(self.unet, "num_class_embeds") is None else {"class_labels": self.labels}
        output = self.unet(xt.to(floats_of(self.unet).dtype), timestep, **condition).sample.to(xt.dtype)
        return output if type(self.scheduler).__name__ in VARIANCE_SCHEDULERS else output[:, : xt.shape[1]]

    def repeat(self, times: int) -> None:
        """Draws each image so many times, side by side."""
        if self.labels is not None:
            self.labels = self.labels.repeat_interleave(times, dim=0)
        self.scales = [scale.repeat_interleave(times) if isinstance(scale, Tensor) else scale for scale in self.scales]

    def reverse(
        self,
        output: Tensor,
        gradient: Tensor | None,
        latents: Tensor,
        xt: Tensor,
        timestep: Tensor,
        index: int,
        **options: Any,
    ) -> tuple[Any, Tensor]:
        """The scheduler's step from x_t, `latents`, with the guidance as it takes it; and the output it was given.

        Further options are the `step`'s, in place of the call's.
        """
        options = self.options | options
        if gradient is None:
            return self.scheduler.step(output, timestep, latents, **options), output
        if self.shifts_mean:
            return self.scheduler.step(output, timestep, latents, guidance=gradient, **options), output
        output = self.shift_score(output, xt, alpha_bar_at(self.scheduler, index, timestep), gradient)
        with unclipped(self.scheduler):
            return self.scheduler.step(output, timestep, latents, **options), output

    def shift_score(self, output: Tensor, xt: Tensor, alpha_bar: float, gradient: Tensor) -> Tensor:
        """Algorithm 2: the model output, of the scheduler's prediction type, with its noise shifted by the gradient.

        As in guided-diffusion, the noise is derived again from the clipped x_0 before the shift, and the shifted x_0 is
        not clipped.
        """
        output, variance = output[:, : xt.shape[1]], output[:, xt.shape[1] :]
        kind = self.scheduler.config.prediction_type
        x0 = clip_x0_(to_x0(output, xt, alpha_bar, kind), self.scheduler.config)
        eps = shift_epsilon(from_x0(x0, xt, alpha_bar, "epsilon"), alpha_bar, gradient)
        return torch.cat([convert(eps, xt, alpha_bar, "epsilon", kind), variance], dim=1)

    def predicted_x0(self, step: Any, output: Tensor, xt: Tensor, timestep: Tensor, index: int) -> Tensor:
        """The x_0 that a step aimed at, which the steps of some schedulers do not tell."""
        x0 = getattr(step, "pred_original_sample", None)
        if x0 is not None:
            return x0
        output, kind = output[:, : xt.shape[1]], self.scheduler.config.prediction_type
        return to_x0(output, xt, alpha_bar_at(self.scheduler, index, timestep), kind)
