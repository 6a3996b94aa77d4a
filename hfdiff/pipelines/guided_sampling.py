"""One sampling of the guided pipeline: what the networks say of x_t, and the step that follows.

Every way of guiding is a part of `evaluate`, which gives the model output and the guidance g; every way of stepping is
a part of `reverse`, which makes x_{t-1} of them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .classifier_free import Reference, extrapolate
from .components import config_of, dtype_of
from .conditions import Conditions
from .gaussian import clip_x0_, convert, from_x0, to_x0
from .guidance import classifier_guidance, log_likelihood, shift_epsilon
from .guide_checks import check_log_prob
from .outputs import draws_from_zero
from .steps import alpha_bar_at, unclipped
from .training_free import GuidanceAtX0

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
        classifier: of (x_t, t), or of x_0 where it `reads_x0`; None where there is none.
        scheduler: whose timesteps are set.
        conditions: of the images.
        at_x0: how guides of the predicted x_0 guide, and the method's other options.
        shifts_mean: whether the scheduler's `step` follows the guidance by itself.
        options: what else `step` is given.
    """

    def __init__(
        self,
        unet: Any,
        classifier: Any,
        scheduler: Any,
        conditions: Conditions,
        at_x0: GuidanceAtX0,
        shifts_mean: bool = False,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.unet, self.classifier, self.scheduler = unet, classifier, scheduler
        self.conditions, self.at_x0 = conditions, at_x0
        self.shifts_mean, self.options = shifts_mean, options

    def evaluate(self, xt: Tensor, timestep: Tensor, index: int) -> Evaluation:
        """The model output at x_t, and the guidance where the step is guided.

        Args:
            xt: x_t as the networks see it, by the scheduler's `scale_model_input`.
            timestep: t.
            index: of the step.
        """
        noisy, at_x0 = self.noisy_labels(index), self.guides_at_x0(index)
        evaluation = (
            self._evaluate_at_x0(xt, timestep, index) if at_x0 else Evaluation(self.predict(xt, timestep, index))
        )
        if noisy is None:
            return evaluation
        method, scale = self.at_x0.method, self.conditions.scales[index]
        log_prob, gradient = classifier_guidance(
            self.classifier, xt, timestep, noisy, scale, method.temperatures, method.entropy_scale
        )
        if evaluation.gradient is not None and evaluation.log_prob is not None:
            log_prob, gradient = evaluation.log_prob + log_prob, evaluation.gradient + gradient
        return Evaluation(evaluation.output, gradient, log_prob)

    def labels_at(self, index: int) -> Tensor | None:
        """The labels that the classifier guides a step to; None where it does not."""
        scale = self.conditions.scales[index]
        return None if isinstance(scale, float) and scale == 0 else self.conditions.labels

    def noisy_labels(self, index: int) -> Tensor | None:
        """Those of a classifier of noisy images."""
        return None if reads_clean(self.classifier) else self.labels_at(index)

    def clean_labels(self, index: int) -> Tensor | None:
        """Those of a classifier of clean ones."""
        return self.labels_at(index) if reads_clean(self.classifier) else None

    def guides_at_x0(self, index: int) -> bool:
        """Whether a step is guided at the predicted x_0."""
        return self.clean_labels(index) is not None or self.conditions.guide_at(index) is not None

    def is_guided(self, index: int) -> bool:
        """Whether anything guides a step."""
        return self.labels_at(index) is not None or self.guides_at_x0(index)

    def _evaluate_at_x0(self, xt: Tensor, timestep: Tensor, index: int) -> Evaluation:
        """What is guided by log f(x_0): the classifier of clean images, w log p(y | x_0), and the caller's guide."""
        labels, guide = self.clean_labels(index), self.conditions.guide_at(index)

        def predict(xt: Tensor) -> tuple[Tensor, Tensor]:
            output = self.predict(xt, timestep, index)
            return output, clip_x0_(self.to_x0(output, xt, timestep, index), self.scheduler.config)

        def log_prob(xt: Tensor, x0: Tensor) -> Tensor:
            total = torch.zeros((), device=x0.device)
            if labels is not None:
                images = (2 * x0 - 1 if draws_from_zero(self.unet) else x0).to(dtype_of(self.classifier))
                logits = self.classifier(images).logits
                total = self.conditions.scales[index] * log_likelihood(logits, labels, self.at_x0.method.temperatures)
            if guide is not None:
                total = total + check_log_prob(guide(xt, timestep, x0), xt, index, timestep)
            return total

        alpha_bar = alpha_bar_at(self.scheduler, index, timestep)
        output, gradient, value = self.at_x0(predict, log_prob, xt, alpha_bar, index)
        return Evaluation(output, gradient, value)

    def to_x0(self, output: Tensor, xt: Tensor, timestep: Tensor, index: int) -> Tensor:
        """The x_0 that a model output stands for, not clipped."""
        output, kind = output[:, : xt.shape[1]], self.scheduler.config.prediction_type
        return to_x0(output, xt, alpha_bar_at(self.scheduler, index, timestep), kind)

    def predict(self, xt: Tensor, timestep: Tensor, index: int) -> Tensor:
        """The model output in the dtype of x_t, without a learned variance that the scheduler would not read."""
        output = self._run(self.unet, self.conditions.labels, xt, timestep)
        references = [
            (reference.scales[index], self._run(reference.unet, self._told(reference), xt, timestep)[:, : xt.shape[1]])
            for reference in self.conditions.references
            if reference.scales[index] != 1
        ]
        if references:
            prediction, variance = output[:, : xt.shape[1]], output[:, xt.shape[1] :]
            output = torch.cat([extrapolate(prediction, references), variance], dim=1)
        return output if type(self.scheduler).__name__ in VARIANCE_SCHEDULERS else output[:, : xt.shape[1]]

    def _run(self, unet: Any, labels: Tensor | None, xt: Tensor, timestep: Tensor) -> Tensor:
        condition = {} if config_of(unet, "num_class_embeds") is None else {"class_labels": labels}
        return unet(xt.to(dtype_of(unet)), timestep, **condition).sample.to(xt.dtype)

    def _told(self, reference: Reference) -> Tensor | None:
        """The labels that a reference is told: its images', or the one after the last class, which stands for none."""
        if not reference.drops_class or self.conditions.labels is None:
            return self.conditions.labels
        return torch.full_like(self.conditions.labels, config_of(reference.unet, "num_class_embeds") - 1)

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
        options = {**self.options, **options}
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
        return self.to_x0(output, xt, timestep, index) if x0 is None else x0


def reads_clean(classifier: Any) -> bool:
    """Whether a classifier is one of clean images, asked at the predicted x_0."""
    return getattr(classifier, "reads_x0", False)
