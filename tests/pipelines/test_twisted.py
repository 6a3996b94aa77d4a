"""Particles sample p(x | y) where the gradient is wrong and the probabilities are right, in four dimensions."""

import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from gaussian_mixture import ExactClassifier, ExactModel, Mixture
from torch import Tensor

from hfdiff import ClassifierGuidedPipeline, DDIMScheduler, DDPMScheduler
from hfdiff.pipelines.twisted import effective_sample_size, systematic

COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}


class FourDimensions(Mixture):
    """Class 0 has two components of unequal weight, which tilt by a wrong gradient."""

    weights = torch.tensor([0.15, 0.35, 0.5], dtype=torch.float64)
    means = torch.tensor([[-0.9, 0.4, 0.7, -0.3], [0.8, 0.9, -0.5, 0.6], [0.6, -0.8, 0.5, -0.7]], dtype=torch.float64)
    scales = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)


MIXTURE = FourDimensions(DDPMScheduler(**COSINE).alphas_cumprod)
ANGLE = math.radians(20)
HALF = 0.5 * torch.eye(4, dtype=torch.float64)
TURNED = torch.eye(4, dtype=torch.float64)
TURNED[:2, :2] = torch.tensor([[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]])
NONE = torch.zeros(4, 4, dtype=torch.float64)


class WrongGradient(ExactClassifier):
    """The exact probabilities with a gradient that a matrix distorts."""

    def distort(self, matrix: Tensor) -> "WrongGradient":
        self.matrix = matrix
        return self

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        fixed = sample.detach()
        return super().forward(fixed + (sample - fixed) @ self.matrix, timestep)


def make_pipeline(matrix: Tensor, scheduler: type = DDPMScheduler, **config) -> ClassifierGuidedPipeline:
    model = ExactModel(sample_size=(1, 4)).attach(MIXTURE)
    pipe = ClassifierGuidedPipeline(
        model, WrongGradient().attach(MIXTURE).distort(matrix), scheduler(**COSINE, **config)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, count: int, particles: int, scale: float = 1.0, seed: int = 0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 50, "output_type": "latent"} | options
    return pipe([0] * count, scale, generator=generator, num_particles=particles, **options)


def first_component_share(samples: Tensor) -> float:
    """How many of class 0 belong to its first component; 0.3 of it should."""
    return MIXTURE.component_log_probs(samples, torch.tensor(0))[:, :2].argmax(1).eq(0).double().mean().item()


def errors(samples: Tensor) -> tuple[float, float]:
    """The largest errors of mean and covariance against the class's."""
    mean, covariance = MIXTURE.conditional_moments(0)
    samples = samples.flatten(1)
    return (samples.mean(0) - mean).abs().max().item(), (torch.cov(samples.T) - covariance).abs().max().item()


@pytest.mark.parametrize("matrix", [HALF, TURNED, NONE], ids=["half", "turned", "none"])
def test_particles_restore_the_class_where_the_gradient_is_wrong(matrix: Tensor) -> None:
    pipe, count = make_pipeline(matrix), 500
    restored = draw(pipe, count, 64)
    mean, covariance = errors(restored.images)
    assert mean < 4 * 0.9 / count**0.5  # standard deviations are at most 0.9
    assert covariance < 0.15
    assert first_component_share(restored.images) == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / count) ** 0.5)
    assert restored.effective_sample_size.shape == (50, count)
    if matrix is not TURNED:
        alone, _ = errors(draw(pipe, 4000, 1).images)
        assert alone > 5 * 0.9 / 4000**0.5 + 0.05  # plain guidance is off by more than sampling error


def test_a_right_gradient_keeps_the_particles_alike() -> None:
    sizes = [draw(make_pipeline(m), 200, 16).effective_sample_size for m in (TURNED @ TURNED.T, HALF, NONE)]
    lows = [size.min(dim=0).values.mean().item() for size in sizes]
    assert lows[0] > lows[1] > lows[2]  # the certificate: the worse the gradient, the fewer particles count


@pytest.mark.parametrize("scheduler", [DDIMScheduler, diffusers.DDIMScheduler])
def test_stochastic_ddim_takes_particles_too(scheduler: type) -> None:
    count = 400
    samples = draw(make_pipeline(HALF, scheduler), count, 32, eta=1.0).images
    assert errors(samples)[0] < 4 * 0.9 / count**0.5
    assert first_component_share(samples) == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / count) ** 0.5)


def test_one_particle_is_plain_guidance() -> None:
    pipe = make_pipeline(HALF)
    plain = pipe([0, 1], 1.0, generator=torch.Generator().manual_seed(0), output_type="latent", num_inference_steps=5)
    calls = pipe.classifier.calls
    pipe.classifier.calls = 0
    single = draw(pipe, 1, 1, num_inference_steps=5)
    assert pipe.classifier.calls == calls == 5
    assert plain.effective_sample_size is single.effective_sample_size is None


def test_a_batch_equals_its_images_one_by_one() -> None:
    pipe = make_pipeline(HALF)

    def run(labels: list[int], seeds: list[int], scale: Tensor):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(labels, scale, generator=generators, num_particles=5, num_inference_steps=8, output_type="latent")

    scale = torch.tensor([1.0, 3.0, 0.5])
    whole = run([0, 1, 1], [4, 5, 6], scale)
    for index, (label, seed) in enumerate(zip([0, 1, 1], [4, 5, 6])):
        one = run([label], [seed], scale[index : index + 1])
        torch.testing.assert_close(one.images[0], whole.images[index])
        torch.testing.assert_close(one.effective_sample_size[:, 0], whole.effective_sample_size[:, index])


def test_an_image_resamples_without_a_trace_in_its_batch() -> None:
    """Wildly different weights: some images resample at steps at which others do not."""
    pipe = make_pipeline(NONE)

    def run(seeds: list[int], scale: Tensor):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_particles": 4, "num_inference_steps": 12, "output_type": "latent"}
        return pipe([0] * len(seeds), scale, generator=generators, **options)

    scale = torch.tensor([0.02, 4.0, 1.0])
    whole = run([4, 5, 6], scale)
    few = whole.effective_sample_size < 2
    assert (few.any(dim=1) & ~few.all(dim=1)).any()
    for index, seed in enumerate([4, 5, 6]):
        one = run([seed], scale[index : index + 1])
        torch.testing.assert_close(one.images[0], whole.images[index])
        torch.testing.assert_close(one.effective_sample_size[:, 0], whole.effective_sample_size[:, index])


def test_unguided_steps_leave_the_weights_alone() -> None:
    pipe = make_pipeline(HALF)
    output = draw(pipe, 300, 32, guidance_interval=(0.0, 0.7), num_inference_steps=40)
    assert errors(output.images)[0] < 4 * 0.9 / 300**0.5 + 0.05  # decided by then
    assert torch.equal(output.effective_sample_size[29], output.effective_sample_size[35])


def test_systematic_resampling_takes_each_particle_as_often_as_it_weighs() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2000, 7, generator=generator, dtype=torch.float64)
    weights[:, 3] = 0
    uniform = torch.rand(2000, generator=generator, dtype=torch.float64)
    chosen = systematic(weights, uniform, 7)
    counts = torch.zeros(2000, 7, dtype=torch.float64).scatter_add_(1, chosen, torch.ones_like(weights))
    expected = 7 * weights / weights.sum(dim=1, keepdim=True)
    assert ((counts - expected).abs() < 1).all()
    assert (counts[:, 3] == 0).all()
    assert (counts - expected).mean(dim=0).abs().max() < 5 * 0.5 / 2000**0.5


def test_effective_sample_size() -> None:
    even, single = torch.zeros(1, 8), torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert effective_sample_size(even).item() == pytest.approx(8)
    assert effective_sample_size(single).item() == pytest.approx(1)
    assert effective_sample_size(torch.tensor([[1.0, 3.0]]).log()).item() == pytest.approx(16 / 10)


def test_what_cannot_be_weighed_is_refused_before_the_models_run() -> None:
    pipe = make_pipeline(HALF)
    for number in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`num_particles` must be an integer of at least 1"):
            draw(pipe, 1, number)
    with pytest.raises(ValueError, match="`num_particles` needs `class_labels`"):
        pipe(num_particles=4)
    for scheduler in (DDIMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler):
        other = make_pipeline(HALF, DDPMScheduler)
        other.scheduler = scheduler.from_config(other.scheduler.config)
        with pytest.raises(ValueError, match="`num_particles` above 1 needs a step that draws noise"):
            draw(other, 1, 4)
    assert pipe.classifier.calls == 0
