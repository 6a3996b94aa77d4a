"""The Twisted Diffusion Sampler: sequential Monte Carlo with the guided step as its proposal.

Wu et al., "Practical and Asymptotically Exact Conditional Sampling in Diffusion Models", NeurIPS 2023, algorithm 1. K
particles of an image each take the guided step, x_{t-1} ~ q = N(μ', σ²) where the model's is p = N(μ, σ²), and bear

    w_{t-1} = w_t · p(x_{t-1} | x_t) p(y | x_{t-1})^s / (q(x_{t-1} | x_t) p(y | x_t)^s)

with s the guidance scale. As K grows, one of them, drawn by weight, is a sample of p(x) p(y | x)^s even where the
gradient is wrong; the probabilities alone must be right.
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .draws import repeat_generators, uniform_per_image
from .editing import Editing
from .guided_sampling import Evaluation, GuidedSampling
from .inputs import check_integer
from .steps import parameters_of

RESAMPLE_BELOW = 0.5  # of K: the effective sample size that lets the particles be resampled (the paper's)


def check_num_particles(num_particles: Any, scheduler: Any, eta: float, is_weighed: bool) -> None:
    """Refuses a number of particles below 1, or more than one where no step is a Gaussian that they can be weighed by.

    Raises:
        ValueError: then.
    """
    check_integer("num_particles", num_particles, remedy="1 is plain guidance")
    if num_particles == 1:
        return
    name, accepted = type(scheduler).__name__, parameters_of(scheduler.step)
    remembers = hasattr(scheduler, "step_index")  # such a scheduler cannot be asked for one step several times
    if "variance_noise" not in accepted or remembers or ("eta" in accepted and not eta):
        raise ValueError(
            f"`num_particles` above 1 needs a step that draws noise, got {num_particles} with a {name}"
            f"{' and an `eta` of 0' if 'eta' in accepted else ''}; use hfdiff.DDPMScheduler, or a DDIMScheduler with "
            "`eta=1.0`."
        )
    if not is_weighed:
        raise ValueError(
            "`num_particles` needs `class_labels`, a `guide` or a `mask_image` to weigh particles by, got "
            f"{num_particles} with none; give one."
        )


class Particles:
    """K particles of each image, side by side in the batch, and their weights.

    Args:
        sampling: of the images; it becomes that of their particles.
        num_images: B.
        num_particles: K.
        generator: of the images: one for all, or one each.
        edit: what is known of the images, if anything: particles are weighed by how likely their step makes it, too.
    """

    def __init__(
        self,
        sampling: GuidedSampling,
        num_images: int,
        num_particles: int,
        generator: Any,
        edit: Editing | None = None,
    ) -> None:
        sampling.conditions = sampling.conditions.repeated(num_particles)
        self.sampling, self.num_particles, self.num_steps = sampling, num_particles, len(sampling.conditions.scales)
        self.generator = generator
        self.inpainting = None if edit is None or edit.known is None else edit
        self.log_weights = torch.zeros(num_images, num_particles, dtype=torch.float64)
        self.step_log_ratio: Tensor | float = 0.0  # log p/q of the last step, minus its log p(y | x_t)^s
        self.known_log_prob: Tensor | float = 0.0  # log p of the known pixels by the last step
        self.effective_sample_sizes: list[Tensor] = []

    def weigh(self, xt: Tensor, evaluation: Evaluation, index: int) -> tuple[Tensor, Evaluation]:
        """Brings the weights to x_t, and resamples where few particles bear most of it; one is left at the last step.

        Args:
            xt: x_t of all particles, (B K, C, H, W).
            evaluation: of these.
            index: of the step.
        """
        change = self.known_log_prob
        if evaluation.log_prob is not None:
            change, self.step_log_ratio = change + evaluation.log_prob.double() + self.step_log_ratio, 0.0
        if isinstance(change, Tensor):
            self.log_weights = (self.log_weights.to(xt.device) + change.view_as(self.log_weights)).log_softmax(dim=1)
        size = effective_sample_size(self.log_weights)
        self.effective_sample_sizes.append(size)
        if index == self.num_steps - 1:
            chosen = systematic(self.log_weights.exp(), uniform_per_image(self.generator, len(size)).to(size.device), 1)
        elif (size < RESAMPLE_BELOW * self.num_particles).any():
            stay = torch.arange(self.num_particles, device=size.device).expand_as(self.log_weights)
            few = (size < RESAMPLE_BELOW * self.num_particles)[:, None]
            uniform = uniform_per_image(self.generator, len(size), few.flatten().tolist()).to(size.device)
            chosen = torch.where(few, systematic(self.log_weights.exp(), uniform, self.num_particles), stay)
            self.log_weights = self.log_weights.masked_fill(few, 0.0)
        else:
            return xt, evaluation
        rows = torch.arange(len(size), device=size.device)[:, None] * self.num_particles + chosen
        kept = {name: v[rows.flatten()] for name, v in evaluation._asdict().items() if v is not None}
        return xt[rows.flatten()], Evaluation(**kept)

    def propose(self, evaluation: Evaluation, xt: Tensor, timestep: Tensor, index: int) -> tuple[Any, Tensor]:
        """The guided step of each particle, and what it does to the weights; the last step is the model's own."""
        output, gradient, log_prob = evaluation
        noise = randn_tensor(
            xt.shape, repeat_generators(self.generator, len(xt) // len(self.log_weights)), xt.device, xt.dtype
        )

        def step(gradient: Tensor | None, noise: Tensor) -> tuple[Any, Tensor]:
            options = {"generator": None, "variance_noise": noise}
            return self.sampling.reverse(output, gradient, xt, xt, timestep, index, **options)

        if index == self.num_steps - 1 or (gradient is None and self.inpainting is None):
            return step(None, noise)
        mean = step(None, torch.zeros_like(noise))[0].prev_sample
        std = step(None, torch.ones_like(noise))[0].prev_sample - mean
        aim = mean if gradient is None else step(gradient, torch.zeros_like(noise))[0].prev_sample
        shift, known = ((aim - mean) / std).double(), torch.zeros((), dtype=torch.bool, device=noise.device)
        if self.inpainting is not None:
            noise, known = self.inpainting.landing(aim, std, noise, index)
            log_prob_known = -(shift + noise.double()).square() / 2 - std.double().log()
            self.known_log_prob = log_prob_known.masked_fill(~known, 0.0).flatten(1).sum(dim=1)
        if log_prob is not None:
            log_ratio = -(shift.square() / 2 + shift * noise.double())  # log p/q at the particle, in its free pixels
            self.step_log_ratio = log_ratio.masked_fill(known, 0.0).flatten(1).sum(dim=1) - log_prob.double()
        return step(gradient, noise)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w² of each row of particles, from 1, one bears all, to K, all the same; (B, K) to (B,)."""
    weights = log_weights.double().softmax(dim=-1)
    return 1 / weights.square().sum(dim=-1)


def systematic(weights: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Systematic resampling: the particles under the points (u + i)/N of the cumulated weights (Douc et al. 2005).

    Each comes ⌊N w⌋ or ⌈N w⌉ times, N w on average.

    Args:
        weights: w, (B, K), of any sum.
        uniform: u in [0, 1), (B,).
        count: N.

    Returns:
        Indices of particles, (B, N).
    """
    cumulated = weights.double().cumsum(dim=1)
    points = (uniform[:, None] + torch.arange(count, device=weights.device)) / count * cumulated[:, -1:]
    return torch.searchsorted(cumulated, points.contiguous(), right=True).clamp(max=weights.shape[1] - 1)
