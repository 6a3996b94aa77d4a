"""With an exact model and an exact classifier, guidance of scale 1 samples the conditional distribution."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from gaussian_mixture import ExactClassifier, ExactModel, Mixture

from hfdiff import AnnealedLangevinScheduler, ClassifierGuidedPipeline, DDPMScheduler
from hfdiff.pipelines.guidance import classifier_gradient, log_likelihood, shift_epsilon, shift_mean

MIXTURE = Mixture(DDPMScheduler().alphas_cumprod)


def exact_pipeline(prediction_type: str = "epsilon", scheduler: type | None = None, **config):
    ours = DDPMScheduler(clip_sample=False, prediction_type=prediction_type, **config)
    scheduler = ours if scheduler is None else scheduler.from_config(ours.config)
    model, classifier = ExactModel(prediction_type).attach(MIXTURE), ExactClassifier().attach(MIXTURE)
    pipe = ClassifierGuidedPipeline(model, classifier, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, label: int, count: int, scale: float, steps: int, guidance_mode: str = "auto") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    output = pipe(
        [label] * count,
        scale,
        num_inference_steps=steps,
        generator=generator,
        guidance_mode=guidance_mode,
        output_type="latent",
    )
    return output.images.flatten(1)


def assert_moments(samples, label, tolerance):
    """Mean and covariance within the sampling error of N draws (standard errors are at most 1/√N here) and a bias."""
    mean, covariance = MIXTURE.conditional_moments(label)
    assert (samples.mean(0) - mean).abs().max() < tolerance
    assert (torch.cov(samples.T) - covariance).abs().max() < 2 * tolerance


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_mean_shift_samples_the_conditional(label, variance_type):
    pipe = exact_pipeline(variance_type=variance_type)
    assert_moments(draw(pipe, label, 6000, 1.0, 250, "mean_shift"), label, 0.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (diffusers.DDIMScheduler, 100),
        (diffusers.DPMSolverMultistepScheduler, 30),
        (diffusers.UniPCMultistepScheduler, 30),
        (diffusers.EulerDiscreteScheduler, 100),
        (diffusers.EulerAncestralDiscreteScheduler, 100),
        (diffusers.DDPMScheduler, 250),
        (None, 250),
    ],
)
def test_score_shift_samples_the_conditional(scheduler, steps, prediction_type):
    if scheduler is diffusers.EulerAncestralDiscreteScheduler and prediction_type == "sample":
        pytest.skip("diffusers' Euler ancestral scheduler does not take x_0 predictions")
    pipe = exact_pipeline(prediction_type, scheduler)
    assert_moments(draw(pipe, 0, 6000, 1.0, steps, "score_shift"), 0, 0.05)


@pytest.mark.parametrize(
    "scheduler", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler]
)
def test_score_shift_equals_the_exact_conditional_model(scheduler):
    """Step by step: the guided model is the model of p(x | y), whatever the scheduler does with it."""

    pipe = exact_pipeline(scheduler=scheduler)
    guided = draw(pipe, 0, 50, 1.0, 20)
    pipe.unet.attach(Conditional(MIXTURE.alpha_bar))
    conditional = draw(pipe, 0, 50, 0.0, 20)
    # diffusers keeps its noise levels in float32, where model and scheduler may differ by a rounding
    torch.testing.assert_close(guided, conditional, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        diffusers.DDIMScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.PNDMScheduler,
    ],
)
def test_callback_sees_the_posterior_mean_of_what_the_models_see(scheduler, kind):
    """E[x_0 | x_t] unguided; E[x_0 | x_t, y] of a score shift, with the exact classifier and scale 1."""
    pipe = exact_pipeline(kind, scheduler)
    names = ("pred_original_sample", "model_input")
    for scale, mode, label in ((0.0, "auto", None), (1.0, "score_shift", 0)):
        states = []
        options = {"guidance_mode": mode, "callback_on_step_end_tensor_inputs": names, "output_type": "latent"}
        pipe(
            [0] * 20,
            scale,
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=lambda pipe, i, t, tensors, states=states: states.append((t, tensors)) or {},
            **options,
        )
        assert all(tuple(tensors) == names for _, tensors in states)
        for t, tensors in states:
            xt, x0 = tensors["model_input"], tensors["pred_original_sample"]
            expected = MIXTURE.posterior_mean(xt, t, label)
            torch.testing.assert_close(x0.flatten(1), expected, rtol=2e-3, atol=2e-3)


class Conditional(Mixture):
    """The mixture's class 0 alone."""

    weights = Mixture.weights[:2] / Mixture.weights[:2].sum()
    means, scales, classes = Mixture.means[:2], Mixture.scales[:2], Mixture.classes[:2]


class UnscaledModel(ExactModel):
    """The exact score of x_0 + σ ε."""

    def forward(self, sample, timestep):
        alpha_bar = self.mixture.alpha_bar_at(timestep)
        eps = super().forward(alpha_bar**0.5 * sample, timestep).sample
        return SimpleNamespace(sample=-eps * (alpha_bar / (1 - alpha_bar)) ** 0.5)


class UnscaledClassifier(ExactClassifier):
    """The exact log p(y | x_0 + σ ε)."""

    def forward(self, sample, timestep):
        return super().forward(self.mixture.alpha_bar_at(timestep) ** 0.5 * sample, timestep)


def langevin_pipeline(kind: str, sampling: str, mixture: type = Mixture, **config):
    """Annealed Langevin dynamics with the exact score and classifier; "score" is given x_t as it is, others scaled."""
    scheduler = AnnealedLangevinScheduler(
        60, 0.05, 10.0, sampling=sampling, prediction_type=kind, scale_input=kind != "score", **config
    )
    levels = mixture(scheduler.alphas_cumprod)
    model = UnscaledModel() if kind == "score" else ExactModel(kind)
    classifier = UnscaledClassifier() if kind == "score" else ExactClassifier()
    pipe = ClassifierGuidedPipeline(model.attach(levels), classifier.attach(Mixture(levels.alpha_bar)), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["score", "epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sampling", ["langevin", "consistent", "predictor_corrector"])
def test_guided_langevin_dynamics_is_that_of_the_exact_conditional_score(sampling, kind):
    """Step by step: s + ∇ log p(y | x_t) is the score of p(x_t | y)."""
    guided = draw(langevin_pipeline(kind, sampling), 0, 20, 1.0, 130)
    conditional = draw(langevin_pipeline(kind, sampling, Conditional), 0, 20, 0.0, 130)
    torch.testing.assert_close(guided, conditional, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("kind", ["score", "v_prediction"])
def test_guided_langevin_dynamics_samples_the_conditional(kind, label):
    pipe = langevin_pipeline(kind, "consistent", steps_per_level=4)
    assert_moments(draw(pipe, label, 6000, 1.0, 600), label, 0.05)


def test_gradient_is_that_of_bayes_rule():
    """∇ log p(y|x_t) = ∇ log p(x_t|y) - ∇ log p(x_t), by central differences."""
    classifier = ExactClassifier().attach(MIXTURE)
    xt = torch.randn(4, 1, 1, 2, dtype=torch.float64)
    labels, t, h = torch.tensor([0, 1, 1, 0]), 300, 1e-5
    gradient = classifier_gradient(classifier, xt, t, labels)
    for pixel in range(2):
        offset = torch.zeros_like(xt)
        offset[..., pixel] = h
        up, down = (MIXTURE.class_log_probs(xt + sign * offset, t) for sign in (1, -1))
        slope = (up.log_softmax(-1) - down.log_softmax(-1)).gather(-1, labels[:, None])[:, 0] / (2 * h)
        torch.testing.assert_close(gradient[..., pixel].flatten(), slope, rtol=1e-6, atol=1e-8)


def test_gradient_scales_per_image_and_mixes_by_probability():
    classifier = ExactClassifier().attach(MIXTURE)
    xt, labels = torch.randn(3, 1, 1, 2, dtype=torch.float64), torch.tensor([0, 1, 0])
    plain = classifier_gradient(classifier, xt, 100, labels)
    scale = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
    torch.testing.assert_close(classifier_gradient(classifier, xt, 100, labels, scale), scale.view(3, 1, 1, 1) * plain)
    other = classifier_gradient(classifier, xt, 100, 1 - labels)
    probs = torch.nn.functional.one_hot(labels, 2) * 0.75 + torch.nn.functional.one_hot(1 - labels, 2) * 0.25
    torch.testing.assert_close(classifier_gradient(classifier, xt, 100, probs), 0.75 * plain + 0.25 * other)


def test_gradient_leaves_no_graph_and_works_in_inference_mode():
    classifier = ExactClassifier().attach(MIXTURE)
    xt, labels = torch.randn(2, 1, 1, 2, dtype=torch.float64), torch.tensor([0, 1])
    expected = classifier_gradient(classifier, xt, 10, labels)
    assert not expected.requires_grad
    assert not xt.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(classifier_gradient(classifier, xt.clone(), 10, labels), expected)


def test_any_callable_is_a_classifier():
    xt = torch.randn(2, 1, 2, 2)
    gradient = classifier_gradient(lambda x, t: x.flatten(1), xt, 0, torch.tensor([1, 3]))
    expected = torch.nn.functional.one_hot(torch.tensor([1, 3]), 4) - xt.flatten(1).softmax(-1)
    torch.testing.assert_close(gradient.flatten(1), expected)


def test_log_likelihood_is_in_float32_for_half_logits():
    logits = torch.tensor([[40.0, 0.0]], dtype=torch.bfloat16)
    assert log_likelihood(logits, torch.tensor([1])).item() == pytest.approx(-40)
    assert log_likelihood(logits, torch.tensor([1])).dtype == torch.float32


def test_shifts():
    mean, gradient = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    variance = torch.tensor([0.1, 0.4], dtype=torch.float64).view(2, 1, 1, 1)
    shifted = shift_mean(mean, variance, gradient)
    torch.testing.assert_close((shifted - mean)[1], 0.4 * gradient[1])
    shifted = shift_epsilon(mean, 0.36, gradient)
    torch.testing.assert_close(shifted - mean, -0.8 * gradient)
