"""Several labels for one image, on a mixture of three classes in four dimensions: products, mixtures, negatives."""

import math

import diffusers
import pytest
import torch
from gaussian_mixture import ExactClassifier, ExactModel, Mixture
from torch import Tensor

from hfdiff import Both, ClassifierGuidedPipeline, DDIMScheduler, DDPMScheduler, Either, Not
from hfdiff.pipelines.composition import composed_labels
from hfdiff.pipelines.corrector import log_acceptance
from hfdiff.pipelines.guidance import classifier_gradient, log_likelihood

COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
NAMES = {0: "a", 1: "b", 2: "c"}


class ThreeClasses(Mixture):
    """Three classes that overlap."""

    weights = torch.tensor([0.3, 0.45, 0.25], dtype=torch.float64)
    means = torch.tensor([[-0.9, 0.5, 0.6, -0.3], [0.8, 0.9, -0.5, 0.6], [0.5, -0.9, 0.5, -0.8]], dtype=torch.float64)
    scales = torch.tensor([0.6, 0.8, 0.7], dtype=torch.float64)
    classes = torch.tensor([0, 1, 2])


MIXTURE = ThreeClasses(DDPMScheduler(**COSINE).alphas_cumprod)
CLEAN = torch.tensor(0)


def draw_mixture(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of the mixture and log p(k | x_0) of each."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(MIXTURE.weights, count, replacement=True, generator=generator)
    noise = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    x0 = MIXTURE.means[chosen] + MIXTURE.scales[chosen, None] * noise
    return x0, MIXTURE.class_log_probs(x0, CLEAN).log_softmax(dim=-1)


def weighted_moments(log_weights: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the points under weights: p(x_0) reweighted, with no sampler in it."""
    weights = log_weights.softmax(dim=0)
    mean = weights @ x0
    return mean, (x0 - mean).T @ (weights[:, None] * (x0 - mean))


X0, LOG_PROBS = draw_mixture(400_000)
A, B, C = LOG_PROBS.unbind(dim=1)
CASES = {  # the label, and its log-probability written out
    "both": (Both("a", "b"), A + B),
    "weighted": (Both("a", 2, weights=[2.0, 0.5]), 2 * A + 0.5 * C),
    "either": (Either("a", "c"), torch.logaddexp(A, C)),
    "mixed": (Either(0, "b", weights=[3, 1]), torch.logaddexp(A + math.log(3), B)),
    "not": (Not("b"), torch.logaddexp(A, C)),  # 1 - p(b), without its cancellation
    "and not": (Both("a", Not("b")), A + torch.logaddexp(A, C)),
    "not either": (Not("a", "b"), C),
}


def make_pipeline(scheduler: type = DDPMScheduler, prediction_type: str = "epsilon") -> ClassifierGuidedPipeline:
    model = ExactModel(prediction_type, sample_size=(1, 4)).attach(MIXTURE)
    classifier = ExactClassifier(num_classes=3, id2label=NAMES).attach(MIXTURE)
    levels = DDPMScheduler(**COSINE, prediction_type=prediction_type)
    pipe = ClassifierGuidedPipeline(model, classifier, scheduler.from_config(levels.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, label, count: int = 4000, **options) -> Tensor:
    options = {"num_inference_steps": 60, "output_type": "latent"} | options
    return pipe([label] * count, 1.0, generator=torch.Generator().manual_seed(0), **options).images.flatten(1)


def errors(samples: Tensor, log_weights: Tensor) -> tuple[float, float]:
    mean, covariance = weighted_moments(log_weights, X0)
    return (samples.mean(0) - mean).abs().max().item(), (torch.cov(samples.T) - covariance).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_log_likelihood_of_a_composition(case: str) -> None:
    label, expected = CASES[case]
    index_of = {"a": 0, "b": 1, "c": 2, 0: 0, 2: 2}.__getitem__
    composed = composed_labels([label, "a"], 3, index_of)
    rows = composed[:1].expand(len(LOG_PROBS), -1, -1)
    torch.testing.assert_close(log_likelihood(LOG_PROBS, rows), expected)
    torch.testing.assert_close(log_likelihood(LOG_PROBS, composed[1:].expand(len(LOG_PROBS), -1, -1)), A)


@pytest.mark.parametrize("case", ["either", "mixed", "not", "not either"])
def test_events_are_sampled_exactly_by_guidance_alone(case: str) -> None:
    label, log_weights = CASES[case]
    mean, covariance = errors(draw(make_pipeline(), label, num_inference_steps=200), log_weights)
    assert mean < 0.05  # standard errors are 0.014 of means, 0.02 of variances; the steps' own bias
    assert covariance < 0.08


@pytest.mark.parametrize("case", ["both", "weighted", "and not"])
def test_products_are_off_without_a_corrector_and_right_with_it(case: str) -> None:
    label, log_weights = CASES[case]
    pipe = make_pipeline()
    alone = errors(draw(pipe, label, num_inference_steps=200), log_weights)
    corrected = errors(draw(pipe, label, corrector_steps=6, corrector_accept=True), log_weights)
    assert alone[0] > 0.055  # 5 standard errors, however many steps
    assert max(corrected) < 0.045


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler],
)
def test_the_corrector_follows_any_scheduler(scheduler: type) -> None:
    label, log_weights = CASES["both"]
    samples = draw(make_pipeline(scheduler), label, 2000, corrector_steps=6, corrector_accept=True)
    assert max(errors(samples, log_weights)) < 0.08


def test_the_trapezoidal_rule_gives_the_ratio_of_densities() -> None:
    """Against the mixture's own log-density, which the pipeline never sees; third order in the displacement."""
    generator, t = torch.Generator().manual_seed(1), torch.tensor(400)
    x = 0.7 * draw_mixture(500, seed=2)[0].view(-1, 1, 1, 4)
    x = x + 0.7 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def density(point: Tensor) -> Tensor:
        return MIXTURE.component_log_probs(point, t).logsumexp(-1)

    misses = []
    for step_size in (0.1, 0.025):
        score = MIXTURE.score(x, t)
        proposed = x + step_size * score + (2 * step_size) ** 0.5 * noise
        there = MIXTURE.score(proposed, t)
        forward = -(noise.flatten(1) ** 2).sum(1) / 2
        backward = -((x - proposed - step_size * there).flatten(1) ** 2).sum(1) / (4 * step_size)
        exact = density(proposed) - density(x) + backward - forward
        misses.append((log_acceptance(x, score, proposed, there, step_size) - exact).abs().mean().item())
    assert misses[1] < 0.01
    assert 5 < misses[0] / misses[1] < 12  # (√4)³ = 8


def test_a_batch_of_compositions_equals_its_images_one_by_one() -> None:
    pipe, labels = make_pipeline(), [Both("a", "b"), "c", Not("a"), Either("a", "c")]

    def run(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"corrector_steps": 2, "corrector_accept": True, "output_type": "latent"}
        return pipe(labels, 1.5, 6, generator=generators, **options).images

    whole = run(labels, range(4))
    for index, label in enumerate(labels):
        torch.testing.assert_close(run([label], [index])[0], whole[index])


def test_no_corrector_costs_no_call_and_changes_no_bit() -> None:
    pipe = make_pipeline()
    plain = pipe([0], 1.0, 5, generator=torch.Generator().manual_seed(0), output_type="latent").images
    calls = pipe.unet.calls
    again = draw(pipe, "a", 1, num_inference_steps=5, corrector_steps=0)
    assert torch.equal(plain.flatten(1), again)
    assert pipe.unet.calls - calls == calls == 5


def test_composed_gradients_are_those_of_the_composed_probability() -> None:
    xt = X0[:50].view(-1, 1, 1, 4)
    classifier = make_pipeline().classifier
    parts = [classifier_gradient(classifier, xt, 300, torch.full((50,), k)) for k in range(2)]
    composed = composed_labels([Both(0, 1, weights=[0.5, 2])] * 50, 3, int)
    torch.testing.assert_close(classifier_gradient(classifier, xt, 300, composed), 0.5 * parts[0] + 2 * parts[1])


def test_what_makes_no_density_is_refused_in_a_sentence() -> None:
    pipe = make_pipeline()
    for make, words in [
        (lambda: Both("a", "b", weights=[1, -1]), "`weights` of `Both` must be a positive number"),
        (lambda: Either("a", weights=[1, 2]), "`weights` of `Either` must be a positive number for each of its 1"),
        (
            lambda: Both("a", weights=2.0),
            "`weights` of `Both` must be a positive number for each of its 1 labels, got 2",
        ),
        (lambda: Both("a", weights=["2"]), "`weights` of `Both` must be a positive number"),
        (lambda: Both("a", weights=[math.inf]), "`weights` of `Both` must be a positive number"),
        (Both, "`Both` must have at least one label"),
        (lambda: pipe([Not("a", "b", "c")]), "must leave at least one class"),
        (lambda: pipe([Either(Both("a", "b"), "c")]), "no `Both` inside"),
        (lambda: pipe([Both("a", "d")]), "names among"),
        (lambda: pipe([Both("a", 7)]), "between 0 and 3 - 1"),
        (lambda: pipe(["a"], corrector_steps=-1), "`corrector_steps` must be an integer of at least 0"),
        (lambda: pipe(["a"], corrector_accept=True), "`corrector_accept` needs"),
        (lambda: pipe(["a"], corrector_steps=1, num_particles=2), "`corrector_steps` must be 0 with"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`corrector_steps` must be 0 for a Heun"):
        pipe(["a"], corrector_steps=1)
    assert pipe.unet.calls == 0
