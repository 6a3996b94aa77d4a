"""Sampling from a noised picture, and inpainting, against the exact distributions of Gaussian mixtures."""

import diffusers
import numpy as np
import pytest
import torch
from gaussian_mixture import ExactClassifier, ExactModel, Mixture
from PIL import Image
from tiny_models import SCHEDULE, make_pipeline

from hfdiff import AnnealedLangevinScheduler, ClassifierGuidedPipeline, DDIMScheduler, DDPMScheduler
from hfdiff.pipelines.editing import Editing, noise_levels
from hfdiff.pipelines.steps import parameters_of

ALPHA_BAR = DDPMScheduler().alphas_cumprod
SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DDIMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.HeunDiscreteScheduler,
]


def exact_pipeline(mixture: Mixture, scheduler: type, size: int) -> ClassifierGuidedPipeline:
    config = DDPMScheduler(clip_sample=False).config
    model, classifier = ExactModel(sample_size=(1, size)).attach(mixture), ExactClassifier().attach(mixture)
    pipe = ClassifierGuidedPipeline(model, classifier, scheduler.from_config(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return make_pipeline()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(pipe, **arguments):
    options = {"class_labels": [0, 1, 2], "num_inference_steps": 10, "generator": generators(0, 1, 2)}
    return pipe(**{**options, "output_type": "pt", **arguments}).images


PICTURE = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
MASK = (torch.arange(8) > 3).float().expand(1, 1, 8, 8)


# --- a noised picture ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 0.6])
@pytest.mark.parametrize(
    ("scheduler", "steps", "draws"),
    [
        (DDPMScheduler, 200, True),
        (diffusers.EulerAncestralDiscreteScheduler, 200, True),
        (diffusers.DDIMScheduler, 200, False),
        (diffusers.DPMSolverMultistepScheduler, 30, False),
        (diffusers.EulerDiscreteScheduler, 200, False),
    ],
)
def test_a_noised_picture_is_denoised_as_the_exact_conditional_says(scheduler, steps, draws, strength):
    """Class 1 is a Gaussian N(m, s² I), for which x_0 given x_t, and the ODE's map of x_t, are linear."""
    mixture, picture = Mixture(ALPHA_BAR), torch.tensor([0.9, 0.8])
    pipe = exact_pipeline(mixture, scheduler, 2)
    options = {"image": picture.view(1, 1, 1, 2), "strength": strength, "output_type": "latent"}
    images = pipe([1] * 4000, 1.0, steps, torch.Generator().manual_seed(0), **options).images.flatten(1)
    alpha_bar = mixture.alpha_bar_at(pipe.scheduler.timesteps[steps - int(strength * steps)])
    mean, variance = mixture.means[2], mixture.scales[2] ** 2
    noised = alpha_bar * variance + 1 - alpha_bar
    gain = alpha_bar**0.5 * variance / noised if draws else (variance / noised) ** 0.5
    expected = mean + gain * alpha_bar**0.5 * (2 * picture - 1 - mean)
    spread = gain**2 * (1 - alpha_bar) + (variance * (1 - alpha_bar) / noised if draws else 0)
    assert (images.mean(0) - expected).abs().max() < 0.03
    assert (torch.cov(images.T) - spread * torch.eye(2)).abs().max() < 0.03


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_unguided_it_is_diffusers_loop(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    images = run(pipe, guidance_scale=0.0, image=PICTURE, strength=0.5, latents=noise, output_type="latent")
    loop = scheduler.from_config(pipe.scheduler.config)
    loop.set_timesteps(10)
    steps = loop.timesteps[5 * loop.order :]
    if hasattr(loop, "set_begin_index"):
        loop.set_begin_index(5 * loop.order)
    xt, streams = loop.add_noise(2 * PICTURE - 1, noise, steps[:1]), generators(0, 1, 2)
    options = {"generator": streams} if "generator" in parameters_of(loop.step) else {}
    with torch.no_grad():
        for t in steps:
            output = pipe.unet(loop.scale_model_input(xt, t), t).sample
            xt = loop.step(output, t, xt, **options).prev_sample
    torch.testing.assert_close(images, xt, rtol=1e-4, atol=1e-5)


def test_progress_and_guidance_begin_where_the_noise_is(pipe):
    seen = []
    scale = lambda progress: seen.append(progress) or 1.0  # noqa: E731
    steps = []
    callback = lambda pipe, i, t, tensors: steps.append((i, int(t))) or {}  # noqa: E731
    run(pipe, image=PICTURE, strength=0.3, guidance_scale=scale, callback_on_step_end=callback)
    assert steps == [(0, 200), (1, 100), (2, 0)]
    assert pipe.num_timesteps == 3
    assert run(pipe, image=PICTURE, strength=0.3, guidance_scale=9.0, guidance_interval=(0.0, 0.6)).equal(
        run(pipe, image=PICTURE, strength=0.3, guidance_scale=0.0)
    )


def test_a_small_strength_stays_nearer_to_the_picture(pipe):
    distances = [(run(pipe, image=PICTURE, strength=s) - PICTURE).abs().mean() for s in (0.2, 0.5, 0.9)]
    assert distances[0] < distances[1] < distances[2]


def test_all_kinds_of_pictures_are_the_same(pipe):
    picture = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8))
    array = np.asarray(picture, dtype=np.float32)[None, ..., None] / 255
    tensor = torch.from_numpy(array).movedim(-1, 1)
    expected = run(pipe, image=picture)
    for same in ([picture] * 3, array, tensor, tensor.expand(3, -1, -1, -1)):
        assert torch.equal(run(pipe, image=same), expected)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_image": MASK, "num_resamples": 2, "jump_length": 3},
        {"mask_image": MASK, "num_particles": 2},
        {"num_particles": 2, "strength": 0.5},
    ],
)
def test_a_batch_equals_its_images_one_by_one(pipe, options, inference):
    pictures = torch.rand(3, 1, 8, 8)
    with torch.inference_mode(inference):
        together = run(pipe, image=pictures, **options)
        for i in range(3):
            alone = run(pipe, class_labels=[i], generator=generators(i), image=pictures[i : i + 1], **options)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


# --- inpainting ------------------------------------------------------------------------------------------------------


class Correlated(Mixture):
    """Three components on four pixels, with a covariance of its own each; class 0 has two of them."""

    means = torch.tensor([[-0.6, 0.3, 0.4, -0.5], [0.5, 0.6, -0.5, 0.2], [0.3, -0.4, 0.5, 0.5]], dtype=torch.float64)
    factors = torch.tensor(
        [
            [[0.4, 0, 0, 0], [0.2, 0.3, 0, 0], [0.3, 0.1, 0.3, 0], [0.1, 0.2, 0, 0.3]],
            [[0.3, 0, 0, 0], [0.0, 0.4, 0, 0], [-0.2, 0.2, 0.3, 0], [0.2, 0.2, 0.1, 0.3]],
            [[0.5, 0, 0, 0], [0.3, 0.3, 0, 0], [0.2, 0.1, 0.3, 0], [0.3, 0.1, 0, 0.4]],
        ],
        dtype=torch.float64,
    )
    covariances = factors @ factors.mT
    known = torch.tensor([0.3, 0.4], dtype=torch.float64)

    def parts(self, xt, timestep):
        """log π_k N(x_t; ...) up to a constant, (B, K), and its gradient with respect to x_t, (B, K, 4)."""
        alpha_bar = self.alpha_bar_at(timestep)
        precisions = torch.linalg.inv(alpha_bar * self.covariances + (1 - alpha_bar) * torch.eye(4))
        offset = alpha_bar**0.5 * self.means - xt.flatten(1)[:, None]
        pulls = torch.einsum("kij,bkj->bki", precisions, offset)
        return self.weights.log() - (pulls * offset).sum(-1) / 2 + torch.logdet(precisions) / 2, pulls

    def component_log_probs(self, xt, timestep):
        return self.parts(xt, timestep)[0]

    def score(self, xt, timestep):
        log_probs, pulls = self.parts(xt, timestep)
        return (log_probs.softmax(-1)[..., None] * pulls).sum(1).view_as(xt)

    def conditional(self, label):
        """Weights, means and covariances of p(last two pixels | first two, y), component by component."""
        kk, uk, uu = (self.covariances[:, a:b, c:d] for a, b, c, d in ((0, 2, 0, 2), (2, 4, 0, 2), (2, 4, 2, 4)))
        gain = uk @ torch.linalg.inv(kk)
        offset = self.known - self.means[:, :2]
        logs = self.weights.log() + torch.distributions.MultivariateNormal(self.means[:, :2], kk).log_prob(self.known)
        if label is not None:
            logs = logs.masked_fill(self.classes != label, -torch.inf)
        return logs.softmax(0), self.means[:, 2:] + (gain @ offset[..., None])[..., 0], uu - gain @ uk.mT


def conditional_errors(samples, label):
    """How far samples' mean, covariance and weights (by their components' responsibilities) are from the exact ones."""
    weights, means, covariances = Correlated.conditional(Correlated(ALPHA_BAR), label)
    mean = weights @ means
    spread = (means - mean)[:, :, None] * (means - mean)[:, None]
    covariance = (weights[:, None, None] * (covariances + spread)).sum(0)
    normal = torch.distributions.MultivariateNormal(means, covariances)
    found = (weights.log() + normal.log_prob(samples[:, None])).softmax(-1).mean(0)
    pairs = ((samples.mean(0), mean), (torch.cov(samples.T), covariance), (found, weights))
    return [float((ours - exact).abs().max()) for ours, exact in pairs]


def inpaint(label, count, steps, scheduler=DDPMScheduler, **resampling):
    pipe = exact_pipeline(Correlated(ALPHA_BAR), scheduler, 4)
    known = Correlated.known / 2 + 0.5
    image, mask = torch.cat([known, torch.zeros(2)]).view(1, 1, 1, 4), torch.tensor([0.0, 0, 1, 1]).view(1, 1, 1, 4)
    options = {"image": image, "mask_image": mask, "output_type": "latent", **resampling}
    labels = {"batch_size": count} if label is None else {"class_labels": [label] * count, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    images = pipe(**labels, num_inference_steps=steps, generator=generator, **options).images.flatten(1)
    torch.testing.assert_close(images[:, :2], Correlated.known.expand(count, 2))
    return images[:, 2:]


@pytest.mark.parametrize("label", [None, 0])
def test_resampling_takes_a_third_of_replacements_bias(label):
    """Measured, 3,000 draws, 100 steps: the mean is off by .49 (unguided) and .32 (class 0), resampled by .31 and .16;
    the weights by .35 and .20, resampled by .21 and .10. Neither is exact."""
    plain = conditional_errors(inpaint(label, 1000, 50), label)
    resampled = conditional_errors(inpaint(label, 1000, 50, num_resamples=10, jump_length=5), label)
    assert plain[0] > 0.2
    assert plain[2] > 0.15
    assert resampled[0] < 0.75 * plain[0]
    assert resampled[2] < 0.75 * plain[2]


@pytest.mark.parametrize("label", [None, 0, 1])
def test_particles_draw_the_exact_conditional(label):
    """Mean, covariance and weights within three standard errors of 400 draws, up to .03 each."""
    samples = inpaint(label, 400, 300, num_particles=16)
    mean, covariance, weights = conditional_errors(samples, label)
    assert mean < 0.09
    assert covariance < 0.09
    assert weights < 0.06


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, AnnealedLangevinScheduler])
def test_known_pixels_are_the_pictures_own(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    steps = 20 if scheduler is AnnealedLangevinScheduler else 10
    images = run(pipe, image=PICTURE, mask_image=MASK, num_inference_steps=steps)
    torch.testing.assert_close(images[..., :4], PICTURE[..., :4].expand(3, -1, -1, -1))
    assert (images - PICTURE)[..., 4:].abs().mean() > 0.05


def test_what_lies_under_the_mask_is_not_read(pipe):
    expected = run(pipe, image=PICTURE, mask_image=MASK)
    assert torch.equal(run(pipe, image=PICTURE * (1 - MASK), mask_image=MASK), expected)
    assert not torch.equal(run(pipe, image=PICTURE * (1 - MASK), mask_image=MASK, strength=0.5), expected)


def test_each_stretch_is_made_so_many_times(pipe):
    visited = []
    options = {"num_resamples": 2, "jump_length": 4, "mask_image": MASK, "strength": 0.7}
    run(pipe, image=PICTURE, callback_on_step_end=lambda p, i, t, x: visited.append(int(t) // 100) or {}, **options)
    assert visited == [6, 5, 4, 3, 6, 5, 4, 3, 2, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_jump_leads_to_the_noise_level_it_names(scheduler):
    """From a x_0 + s ε at a step to that of a noisier one, on many pixels."""
    scheduler = scheduler.from_config(DDPMScheduler().config)
    scheduler.set_timesteps(10)
    start, end = 6 * scheduler.order, 2 * scheduler.order
    levels = noise_levels(scheduler)
    x0, noise = torch.full((1, 1, 300, 300), 0.5), torch.randn(1, 1, 300, 300)
    edit = Editing(x0, torch.ones(1, 1, 1, 1, dtype=torch.bool), 1.0)
    edit.begin(scheduler, noise, None, lambda: scheduler.set_timesteps(10))
    jumped = edit._jump(levels[start][0] * x0 + levels[start][1] * noise, start, end)
    a, s = levels[end]
    assert jumped.mean().item() == pytest.approx(0.5 * a, abs=0.02 * s)
    assert jumped.std().item() == pytest.approx(s, rel=0.01)
    if scheduler.init_noise_sigma == 1:
        assert a**2 + s**2 == pytest.approx(1, abs=1e-5)


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": torch.zeros(1, 1, 9, 8)}, r"`image` must have 1 channels and the model's size \(8, 8\)"),
        ({"image": Image.new("L", (9, 8))}, r"`image` must have the model's size \(8, 8\), got .* \(8, 9\)"),
        ({"image": [Image.new("L", (8, 8)), Image.new("L", (9, 8))]}, "`image` must have the model's size"),
        ({"image": torch.zeros(1, 3, 8, 8)}, "`image` must have 1 channels"),
        ({"image": torch.zeros(8, 8)}, "`image` must have 4 axes"),
        ({"image": torch.zeros(2, 1, 8, 8)}, "`image` must be one for all or one for each of the 3 images"),
        ({"image": torch.full((1, 1, 8, 8), torch.nan)}, "`image` must be in"),
        ({"image": PICTURE * 2}, "`image` must be in"),
        ({"image": "picture.png"}, "`image` must be a PIL image"),
        ({"image": [PICTURE]}, "`image` as a list must be of PIL images"),
        ({"mask_image": MASK}, "got no `image`"),
        ({"image": PICTURE, "mask_image": MASK * torch.nan}, "`mask_image` must be in"),
        ({"image": PICTURE, "mask_image": MASK[..., :4]}, "`mask_image` must have 1 channels"),
        ({"strength": 0.5}, "`strength` needs an `image`"),
        ({"image": PICTURE, "strength": 0.0}, "`strength` must be in"),
        ({"image": PICTURE, "strength": 1.1}, "`strength` must be in"),
        ({"image": PICTURE, "strength": float("nan")}, "`strength` must be in"),
        ({"image": PICTURE, "strength": True}, "`strength` must be in"),
        ({"image": PICTURE, "strength": 0.05}, "`strength` must leave a step"),
        ({"image": PICTURE, "num_resamples": 2}, "`num_resamples` needs a `mask_image`"),
        ({"image": PICTURE, "mask_image": MASK, "num_resamples": 2, "num_particles": 2}, "exclude each other"),
        ({"class_labels": None, "image": PICTURE, "num_particles": 2, "generator": None}, "or a `mask_image`"),
        ({"image": PICTURE, "mask_image": MASK, "num_resamples": 0}, "`num_resamples` must be an integer"),
        ({"image": PICTURE, "mask_image": MASK, "jump_length": 1.5}, "`jump_length` must be an integer"),
    ],
)
def test_a_bad_edit_is_one_sentence_before_a_model_runs(pipe, arguments, words):
    pipe.unet.register_forward_hook(lambda *_: pytest.fail("the UNet ran"))
    with pytest.raises(ValueError, match=words):
        run(pipe, **arguments)


def test_schedulers_that_cannot_follow_are_refused(pipe):
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="begin anywhere, got PNDMScheduler"):
        run(pipe, image=PICTURE)
    pipe.scheduler = AnnealedLangevinScheduler.from_config(DDPMScheduler(**SCHEDULE).config)
    with pytest.raises(ValueError, match="raise its `steps_per_level`"):
        run(pipe, image=PICTURE, mask_image=MASK, num_resamples=2, num_inference_steps=20)
