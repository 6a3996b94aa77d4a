"""Guides at the predicted x_0 against closed forms: on one Gaussian some are exact, on a mixture none is."""

import diffusers
import pytest
import torch
from gaussian_mixture import ExactClassifier, ExactModel, Mixture
from torch import Tensor, nn

from hfdiff import ClassifierGuidedPipeline, CleanClassifier, DDPMScheduler, GuidanceMethod
from hfdiff.pipelines.guidance import classifier_guidance, inverse_entropy, log_likelihood
from hfdiff.pipelines.training_free import GuidanceAtX0

COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
ALPHA_BAR = DDPMScheduler(**COSINE).alphas_cumprod
MIXTURE = Mixture(ALPHA_BAR)
DIRECTION = torch.tensor([0.6, 0.8], dtype=torch.float64)  # y = a·x_0 + 0.5 ε
MEASURED, NOISE = 0.7, 0.25


class OneGaussian(Mixture):
    weights = torch.ones(1, dtype=torch.float64)
    means = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    scales = torch.tensor([0.8], dtype=torch.float64)
    classes = torch.tensor([0])


class UnitGaussian(OneGaussian):
    scales = torch.ones(1, dtype=torch.float64)


GAUSSIAN, UNIT = OneGaussian(ALPHA_BAR), UnitGaussian(ALPHA_BAR)


def posterior_variance(mixture: OneGaussian, timestep: Tensor) -> float:
    """Var(x_0 | x_t) of one Gaussian."""
    alpha_bar, variance = float(mixture.alpha_bar_at(timestep)), float(mixture.scales[0]) ** 2
    return variance * (1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar)


def likelihood(x0: Tensor, variance: float) -> Tensor:
    """log N(y; a·x_0, variance), but for a constant."""
    return -((MEASURED - x0.flatten(1) @ DIRECTION) ** 2) / (2 * variance)


def measured(xt: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
    """log p(y | x_0): the guide of diffusion posterior sampling."""
    return likelihood(x0, NOISE)


def make_pipeline(mixture: Mixture, classifier: nn.Module | None = None, scheduler: type = DDPMScheduler):
    scheduler = scheduler.from_config(DDPMScheduler(**COSINE).config)
    pipe = ClassifierGuidedPipeline(ExactModel().attach(mixture), classifier, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, *labels: int, seed: int = 0, **options) -> Tensor:
    options = {"num_inference_steps": 20, "generator": torch.Generator().manual_seed(seed)} | options
    return pipe(list(labels) or None, output_type="latent", **options).images


def guided(mixture: Mixture, guide, method: GuidanceMethod, index: int, count: int = 5, seed: int = 0):
    """x_t, the timestep, and the gradient and log-probability of a guide there."""
    scheduler = DDPMScheduler(**COSINE)
    scheduler.set_timesteps(20)
    timestep = scheduler.timesteps[index]
    xt = torch.randn(count, 1, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    model, alpha_bar = ExactModel().attach(mixture), mixture.alpha_bar_at(timestep)

    def predict(xt: Tensor) -> tuple[Tensor, Tensor]:
        eps = model(xt, timestep).sample
        return eps, (xt - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5

    at_x0 = GuidanceAtX0(method, scheduler, scheduler.timesteps, generator)
    _, gradient, value = at_x0(predict, lambda xt, x0: guide(xt, timestep, x0), xt, float(alpha_bar), index)
    return xt, timestep, gradient, value


def exact_gradient(mixture: OneGaussian, xt: Tensor, timestep: Tensor) -> Tensor:
    """∇ log p(y | x_t) of the measurement: a·x_0 given x_t is Gaussian."""
    mean, variance = mixture.posterior_mean(xt, timestep), posterior_variance(mixture, timestep)
    alpha_bar = float(mixture.alpha_bar_at(timestep))
    slope = alpha_bar**0.5 * variance / (1 - alpha_bar)  # of E[x_0 | x_t]
    residual = (MEASURED - mean @ DIRECTION) / (NOISE + variance)
    return (slope * residual[:, None] * DIRECTION).view_as(xt)


# --- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [2, 8, 15])
def test_posterior_sampling_is_off_by_the_variance_it_leaves_out(index: int) -> None:
    xt, timestep, gradient, _ = guided(GAUSSIAN, measured, GuidanceMethod.dps(), index)
    excess = (NOISE + posterior_variance(GAUSSIAN, timestep)) / NOISE
    torch.testing.assert_close(gradient, excess * exact_gradient(GAUSSIAN, xt, timestep))


def test_on_a_mixture_it_is_the_covariance_times_the_gradient_at_the_mean() -> None:
    """∇ log p(y | x_t) = √ᾱ/(1-ᾱ) (E[x_0 | x_t, y] - E[x_0 | x_t]) is what it should be (Tweedie's formula)."""
    clean = Mixture(torch.ones(1))

    def label_0(xt: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        return clean.class_log_probs(x0, torch.tensor(0)).log_softmax(-1)[:, 0]

    xt, timestep, gradient, value = guided(MIXTURE, label_0, GuidanceMethod.dps(), 12)
    alpha_bar = MIXTURE.alpha_bar_at(timestep)
    parts = MIXTURE.component_log_probs(xt, timestep).softmax(-1)[..., None]
    variance = (MIXTURE.scales**2)[:, None]
    gain = alpha_bar**0.5 * variance / (alpha_bar * variance + 1 - alpha_bar)
    means = MIXTURE.means + gain * (xt.flatten(1)[:, None] - alpha_bar**0.5 * MIXTURE.means)
    mean = (parts * means).sum(1)
    within = (parts * variance * (1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar)).sum(1)
    spread = (means - mean[:, None]).mT @ (parts * (means - mean[:, None]))
    covariance = spread + within[..., None] * torch.eye(2, dtype=torch.float64)
    at_mean = mean.view_as(xt).requires_grad_()
    log_prob = label_0(xt, timestep, at_mean)
    (slope,) = torch.autograd.grad(log_prob.sum(), at_mean)
    expected = alpha_bar**0.5 / (1 - alpha_bar) * (covariance @ slope.flatten(1)[..., None])[..., 0]
    torch.testing.assert_close(gradient.flatten(1), expected)
    torch.testing.assert_close(value, log_prob.detach())
    exact = MIXTURE.posterior_mean(xt, timestep, 0) - MIXTURE.posterior_mean(xt, timestep)
    exact = alpha_bar**0.5 / (1 - alpha_bar) * exact
    assert (gradient.flatten(1) - exact).norm() > 0.1 * exact.norm()


def test_smoothing_by_the_variance_of_x0_is_the_likelihood() -> None:
    """With unit variance 1-ᾱ is the variance of x_0 given x_t, so a smoothing of 1 is exact as samples grow."""
    errors = []
    for samples in (4, 4000):
        method = GuidanceMethod.lgd(samples, smoothing=1.0)
        xt, timestep, gradient, value = guided(UNIT, measured, method, 12)
        variance = NOISE + posterior_variance(UNIT, timestep)
        exact = likelihood(UNIT.posterior_mean(xt, timestep), variance) + 0.5 * torch.tensor(NOISE / variance).log()
        errors.append((gradient - exact_gradient(UNIT, xt, timestep)).abs().max().item())
    assert errors[1] < 0.05 < 0.2 < errors[0]
    torch.testing.assert_close(value, exact, atol=0.1, rtol=0)


def test_the_gradient_at_x0_is_that_of_x_t_where_the_variance_is_1() -> None:
    *_, through, value = guided(UNIT, measured, GuidanceMethod.dps(), 10)
    *_, alone, same = guided(UNIT, measured, GuidanceMethod.mpgd(), 10)
    torch.testing.assert_close(alone, through)
    torch.testing.assert_close(same, value)
    *_, both, _ = guided(UNIT, measured, GuidanceMethod.universal(1, rho=0.5, mu=0.25), 10)
    torch.testing.assert_close(both, 0.75 * through)


def test_iterations_climb_from_where_the_last_one_ended() -> None:
    _, timestep, gradient, _ = guided(UNIT, measured, GuidanceMethod(rho=0, mu=0.3, iterations=2), 10)
    alpha_bar = float(UNIT.alpha_bar_at(timestep))
    shrink = 1 - 0.3 * (1 - alpha_bar) / NOISE  # of the residual, by each
    *_, once, _ = guided(UNIT, measured, GuidanceMethod.mpgd(0.3), 10)
    torch.testing.assert_close(gradient, (1 + shrink) * once)


def test_projection_keeps_x0_where_it_maps_it() -> None:
    def onto_first(x0: Tensor) -> Tensor:
        return x0 * torch.tensor([1.0, 0.0])

    xt, timestep, gradient, _ = guided(UNIT, measured, GuidanceMethod.mpgd(projection=onto_first), 10)
    alpha_bar = float(UNIT.alpha_bar_at(timestep))
    shifted = UNIT.posterior_mean(xt, timestep) + (1 - alpha_bar) / alpha_bar**0.5 * gradient.flatten(1)
    torch.testing.assert_close(shifted[:, 1], torch.zeros_like(shifted[:, 1]))


@pytest.mark.parametrize(("schedule", "grows"), [("increase", True), ("decrease", False)])
def test_schedules_have_mean_1(schedule: str, grows: bool) -> None:
    ratios = []
    for index in range(20):
        *_, scheduled, _ = guided(UNIT, measured, GuidanceMethod(rho_schedule=schedule), index)
        *_, plain, _ = guided(UNIT, measured, GuidanceMethod(), index)
        ratios.append((scheduled / plain).mean().item())
    assert sum(ratios) / 20 == pytest.approx(1)
    assert ratios == sorted(ratios, reverse=not grows)


# --- the logits ------------------------------------------------------------------------------------------------------


def test_temperatures_are_of_the_joint_and_the_marginal() -> None:
    """For linear logits f = W x: τ_1 w_y - τ_2 W^T softmax(τ_2 W x)."""
    weight = torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    value = log_likelihood(x @ weight.T, labels, (1.3, 0.5))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    expected = 1.3 * weight[labels] - 0.5 * (0.5 * x @ weight.T).softmax(-1) @ weight
    torch.testing.assert_close(gradient, expected.detach())
    joint = log_likelihood(x @ weight.T, labels, (1.0, 0.0))  # the joint energy alone
    torch.testing.assert_close(torch.autograd.grad(joint.sum(), x)[0], weight[labels])


def test_the_scale_by_entropy_is_of_known_entropies() -> None:
    probabilities = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    scales = inverse_entropy(probabilities.clamp(min=1e-30).log())
    torch.testing.assert_close(scales, torch.tensor([1, 2, 2 / 1.75], dtype=torch.float64))
    assert inverse_entropy(torch.tensor([[200.0, 0.0]])).isfinite().all()


def test_the_scale_by_entropy_is_of_the_gradient_alone() -> None:
    classifier = ExactClassifier().attach(MIXTURE)
    xt, labels, timestep = (
        torch.randn(5, 1, 1, 2, dtype=torch.float64),
        torch.tensor([0, 1, 0, 1, 0]),
        torch.tensor(300),
    )
    value, gradient = classifier_guidance(classifier, xt, timestep, labels, 2.0)
    same, scaled = classifier_guidance(classifier, xt, timestep, labels, 2.0, entropy_scale=True)
    scale = inverse_entropy(classifier(xt, timestep).logits)
    assert torch.equal(value, same)
    torch.testing.assert_close(scaled, gradient * scale.view(-1, 1, 1, 1))


# --- sampling --------------------------------------------------------------------------------------------------------


def posterior() -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 given y of the one Gaussian."""
    variance = float(GAUSSIAN.scales[0]) ** 2
    precision = torch.eye(2, dtype=torch.float64) / variance + torch.outer(DIRECTION, DIRECTION) / NOISE
    covariance = precision.inverse()
    return covariance @ (GAUSSIAN.means[0] / variance + DIRECTION * MEASURED / NOISE), covariance


def errors(samples: Tensor, mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    samples = samples.flatten(1)
    return (samples.mean(0) - mean).abs().max().item(), (torch.cov(samples.T) - covariance).abs().max().item()


@pytest.mark.parametrize("scheduler", [DDPMScheduler, diffusers.DDIMScheduler])
def test_a_linear_inverse_problem_with_the_right_covariance_is_exact(scheduler: type) -> None:
    pipe, count = make_pipeline(GAUSSIAN, scheduler=scheduler), 4000

    def right(xt: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        return likelihood(x0, NOISE + posterior_variance(GAUSSIAN, timestep))

    samples = draw(pipe, guide=right, batch_size=count, num_inference_steps=200)
    mean, covariance = errors(samples, *posterior())
    assert mean < 4 * 0.8 / count**0.5 + 0.01  # standard deviations are at most 0.8
    assert covariance < 4 * 0.9 / count**0.5 + 0.01
    naive = draw(pipe, guide=measured, batch_size=count, num_inference_steps=200)
    assert errors(naive, *posterior())[0] > 0.1  # too sure of y


def test_particles_make_it_exact_without() -> None:
    pipe, count = make_pipeline(GAUSSIAN), 500
    samples = draw(pipe, guide=measured, batch_size=count, num_inference_steps=50, num_particles=32)
    mean, covariance = errors(samples, *posterior())
    assert mean < 4 * 0.8 / count**0.5
    assert covariance < 0.12


def exact_guide(mixture: Mixture, label: int):
    """log p(y | x_t), as a guide that needs no x_0."""
    return lambda xt, timestep, x0: mixture.class_log_probs(xt, timestep).log_softmax(-1)[:, label]


def test_a_guide_is_a_classifier_of_scale_1() -> None:
    with_classifier = make_pipeline(MIXTURE, ExactClassifier().attach(MIXTURE))
    expected = draw(with_classifier, 0, 0, 0, guidance_scale=1.0)
    alone = draw(make_pipeline(MIXTURE), guide=exact_guide(MIXTURE, 0), batch_size=3)
    torch.testing.assert_close(alone, expected)
    beside = draw(with_classifier, 0, 0, 0, guidance_scale=1.5, guide=exact_guide(MIXTURE, 0))
    torch.testing.assert_close(beside, draw(with_classifier, 0, 0, 0, guidance_scale=2.5))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        diffusers.EulerDiscreteScheduler,  # in x_0 + σ ε
        diffusers.DPMSolverMultistepScheduler,  # remembers its last step
    ],
)
def test_recurrence_leaves_what_is_right_as_it_is(scheduler: type) -> None:
    pipe, count = make_pipeline(MIXTURE, scheduler=scheduler), 3000
    options = {"guide": exact_guide(MIXTURE, 0), "batch_size": count, "num_inference_steps": 50}
    samples = draw(pipe, **options, method=GuidanceMethod(recurrence=3))
    assert pipe.unet.calls == 150
    mean, covariance = errors(samples, *MIXTURE.conditional_moments(0))
    assert mean < 4 * 1.0 / count**0.5 + 0.03
    assert covariance < 0.1


def test_recurrence_mends_a_gradient_that_is_too_short() -> None:
    """The model makes likely what guidance has moved; so each round moves on."""

    def half(xt: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        return 0.5 * exact_guide(MIXTURE, 0)(xt, timestep, x0)

    def share(recurrence: int) -> float:
        method = GuidanceMethod(recurrence=recurrence)
        samples = draw(make_pipeline(MIXTURE), guide=half, batch_size=1000, num_inference_steps=25, method=method)
        return MIXTURE.class_log_probs(samples, torch.tensor(0)).softmax(-1)[:, 0].mean().item()

    assert share(1) + 0.05 < share(4)


class Nearest(nn.Module):
    """The mixture's classes of clean images."""

    def forward(self, x0: Tensor) -> Tensor:
        return Mixture(torch.ones(1)).class_log_probs(x0, torch.tensor(0))


METHODS = {
    "dps": GuidanceMethod.dps(0.5),
    "lgd": GuidanceMethod.lgd(2),
    "freedom": GuidanceMethod.freedom(2),
    "mpgd": GuidanceMethod.mpgd(projection=torch.tanh),
    "universal": GuidanceMethod.universal(2, 2),
    "tfg": GuidanceMethod.tfg(recurrence=2, samples=3, iterations=2),
    "elucd": GuidanceMethod.elucd(),
    "ed_dpm": GuidanceMethod.ed_dpm(),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_its_images_one_by_one(name: str) -> None:
    noisy = ExactClassifier().attach(MIXTURE) if name == "ed_dpm" else CleanClassifier(Nearest(), num_classes=2)
    pipe, guide = make_pipeline(MIXTURE, noisy), None if name == "ed_dpm" else measured

    def run(labels: list[int], seeds: list[int], scales: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"guide": guide, "method": METHODS[name], "generator": generators, "num_inference_steps": 8}
        return draw(pipe, *labels, guidance_scale=scales, **options)

    labels, seeds, scales = [0, 1, 1], [3, 4, 5], torch.tensor([1.0, 2.0, 0.0])
    whole = run(labels, seeds, scales)
    for index, (label, seed) in enumerate(zip(labels, seeds)):
        torch.testing.assert_close(run([label], [seed], scales[index : index + 1])[0], whole[index])


def test_a_clean_classifier_is_the_guide_of_its_label() -> None:
    classifier = CleanClassifier(Nearest(), num_classes=2, guidance_scale=3.0)
    pipe = make_pipeline(MIXTURE, classifier)
    assert (pipe.num_classes, pipe.default_guidance_scale) == (2, 3.0)

    def label_1(xt: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        return 3.0 * Nearest()(x0).log_softmax(-1)[:, 1]

    alone = draw(make_pipeline(MIXTURE), guide=label_1, batch_size=2)
    torch.testing.assert_close(draw(pipe, 1, 1), alone)
    unguided = draw(pipe, 1, 1, guidance_scale=0.0)
    assert torch.equal(unguided, draw(make_pipeline(MIXTURE), batch_size=2))
    tempered = draw(pipe, 1, 1, method=GuidanceMethod(joint_temperature=2.0))
    assert (tempered - alone).abs().max() > 0.01


def test_a_guide_is_asked_inside_the_interval_alone() -> None:
    asked = []

    def guide(xt: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        asked.append(int(timestep))
        return likelihood(x0, NOISE)

    pipe = make_pipeline(GAUSSIAN)
    draw(pipe, guide=guide, guidance_interval=(0.5, 1.0), method=GuidanceMethod.freedom(2), num_inference_steps=10)
    assert len(asked) == 10
    assert max(asked) < 500
    assert pipe.unet.calls == 15  # steps that are not guided are taken once


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (lambda xt, t, x0: x0.sum(), r"of shape \(2,\), got shape \(\) at step 0 \(timestep 950\)"),
        (lambda xt, t, x0: 1.0, "got a float at step 0"),
        (lambda xt, t, x0: x0.flatten(1).sum(1) * torch.nan, r"finite log-probabilities, got \[nan, nan\] at step 0"),
        (lambda xt, t, x0: x0.detach().flatten(1).sum(1), "without a graph at step 0"),
        (lambda xt, t, x0: torch.ones(2, requires_grad=True), "depends on x_t, or x_0, got one that does not at step"),
        (lambda xt, t, x0: (0 * x0.flatten(1).sum(1)).sqrt(), "a finite gradient by x_t, or x_0, got NaN .* at step 0"),
    ],
)
def test_a_guide_that_gives_no_gradient_is_told_at_its_step(guide, words: str) -> None:
    with pytest.raises(ValueError, match=f"^`guide` must (give|have) .*{words}"):
        draw(make_pipeline(GAUSSIAN), guide=guide, batch_size=2)


@pytest.mark.parametrize(
    ("projection", "words"),
    [
        (lambda x0: x0[..., :1], r"of shape \(1, 1, 1, 2\), got shape \(1, 1, 1, 1\) at step 0 \(timestep 950\)"),
        (lambda x0: x0 * torch.nan, "got NaN or infinity at step 0"),
        (lambda x0: None, "got a NoneType at step 0"),
    ],
)
def test_a_projection_to_no_images_is_told_at_its_step(projection, words: str) -> None:
    with pytest.raises(ValueError, match=f"^`projection` must give finite images .*{words}"):
        draw(make_pipeline(GAUSSIAN), guide=measured, method=GuidanceMethod.mpgd(projection=projection))


def test_the_gradient_at_x0_alone_is_of_x0() -> None:
    """A guide of other things has none."""

    def constant(xt: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        return torch.ones(1, requires_grad=True)

    with pytest.raises(ValueError, match="`guide` must give a value that depends on x_0, got one that does not at st"):
        draw(make_pipeline(GAUSSIAN), guide=constant, method=GuidanceMethod.mpgd())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guide": 3}, "`guide` must be a function of"),
        ({"guide": lambda xt, timestep: xt}, r"`guide` must take \(x_t, t, x_0\), got a function of \(xt, timestep\)"),
        ({"method": GuidanceMethod.freedom()}, "`method` needs a classifier or a `guide`"),
        (
            {"guide": measured, "method": GuidanceMethod(joint_temperature=2.0)},
            "`method` changes a classifier's logits",
        ),
        ({"guide": measured, "method": "freedom"}, "`method` must be a GuidanceMethod"),
        ({"method": GuidanceMethod.mpgd()}, "`method` needs a classifier or a `guide`"),
        ({"guide": measured, "method": GuidanceMethod.ed_dpm()}, "`method` scales by the entropy of a classifier"),
        (
            {"guide": measured, "method": GuidanceMethod.freedom(2), "num_particles": 2},
            "`method` must have a recurrence of 1 with `num_particles`",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_models_run(options: dict, words: str) -> None:
    pipe = make_pipeline(GAUSSIAN)
    with pytest.raises(ValueError, match=words):
        draw(pipe, **options)
    assert pipe.unet.calls == 0


def test_options_at_x0_are_not_for_a_classifier_of_noisy_images() -> None:
    pipe = make_pipeline(MIXTURE, ExactClassifier().attach(MIXTURE))
    with pytest.raises(ValueError, match=r"`method` has options at the predicted x_0, \['rho', 'mu'\], which nothing"):
        draw(pipe, 0, method=GuidanceMethod.mpgd())


def test_steps_of_several_calls_are_not_taken_again() -> None:
    pipe = make_pipeline(GAUSSIAN, scheduler=diffusers.HeunDiscreteScheduler)
    with pytest.raises(ValueError, match="`method` must have a recurrence of 1 for a HeunDiscreteScheduler"):
        draw(pipe, guide=measured, method=GuidanceMethod.freedom(2))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rho": -1.0}, "rho"),
        ({"mu": torch.inf}, "mu"),
        ({"recurrence": 0}, "recurrence"),
        ({"samples": 1.5}, "samples"),
        ({"rho_schedule": "up"}, "rho_schedule"),
        ({"rho": 0.0}, "rho"),
        ({"rho": "1"}, "rho"),
        ({"mu": None}, "mu"),
        ({"projection": 3}, "projection"),
    ],
)
def test_options_out_of_range_are_named(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^`{name}`"):
        GuidanceMethod(**options)


def test_inference_mode_changes_nothing() -> None:
    pipe, options = make_pipeline(GAUSSIAN), {"guide": measured, "method": GuidanceMethod.tfg(samples=2)}
    expected = draw(pipe, **options)
    with torch.inference_mode():
        samples = draw(pipe, **options)
    assert torch.equal(samples, expected)
