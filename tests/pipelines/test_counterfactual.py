"""The search for counterfactuals: exact on two Gaussians, and what it says of its finds."""

import diffusers
import pytest
import torch
from gaussian_mixture import ExactClassifier, ExactModel, Mixture
from tiny_models import SCHEDULE, make_pipeline

from hfdiff import AnnealedLangevinScheduler, ClassifierGuidedPipeline, DDPMScheduler
from hfdiff.pipelines.conditions import Conditions
from hfdiff.pipelines.counterfactual import Inversion
from hfdiff.pipelines.guided_sampling import GuidedSampling
from hfdiff.pipelines.training_free import GuidanceAtX0, GuidanceMethod


class Pair(Mixture):
    """Two Gaussians of one width on three pixels, which differ in the first: log p(1 | x) / p(0 | x) = 2 m x / s²."""

    offset, scale = 0.4, 0.2
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    means = torch.tensor([[-offset, 0, 0], [offset, 0, 0]], dtype=torch.float64)
    scales = torch.full((2,), scale, dtype=torch.float64)
    classes = torch.tensor([0, 1])


PICTURES = torch.tensor([[-0.5, 0.3, -0.2], [-0.1, -0.4, 0.1], [-0.35, 0.0, 0.5]], dtype=torch.float64).view(3, 1, 1, 3)


@pytest.fixture
def pair() -> ClassifierGuidedPipeline:
    scheduler = DDPMScheduler(clip_sample=False)
    mixture = Pair(scheduler.alphas_cumprod)
    model, classifier = ExactModel(sample_size=(1, 3)).attach(mixture), ExactClassifier().attach(mixture)
    return ClassifierGuidedPipeline(model, classifier, scheduler, default_guidance_scale=1.0)


def unguided(model: ExactModel, scheduler: DDPMScheduler, steps: int) -> GuidedSampling:
    at_x0 = GuidanceAtX0(GuidanceMethod(), scheduler, scheduler.timesteps, None)
    return GuidedSampling(model, None, scheduler, Conditions(None, [0.0] * steps, guided=[False] * steps), at_x0)


def find(pipe, pictures=PICTURES, labels=1, **options):
    return pipe.counterfactual(pictures / 2 + 0.5, labels, **{"output_type": "latent", **options})


def test_nothing_changes_but_what_the_class_needs(pair):
    """The classes differ in one pixel, so the others stay; the least change takes it to the log-odds asked for."""
    found = find(pair, confidence=0.9, proximity=0.0, strength=[k / 20 for k in range(1, 21)])
    change = (found.images - PICTURES).flatten(1)
    torch.testing.assert_close(change[:, 1:], torch.zeros(3, 2, dtype=torch.float64), rtol=0, atol=1e-9)
    needed = Pair.scale**2 / (2 * Pair.offset) * torch.tensor(9.0, dtype=torch.float64).log() - PICTURES[:, 0, 0, 0]
    assert (change[:, 0] >= needed - 1e-9).all()
    assert (change[:, 0] < 1.5 * needed).all()
    assert (found.probabilities >= 0.9).all()
    assert found.original_labels.tolist() == [0, 0, 0]
    torch.testing.assert_close(found.l2, change[:, 0] / 2)
    torch.testing.assert_close(found.l1, change[:, 0] / 2)


def test_more_values_to_try_are_never_farther(pair):
    few = find(pair, strength=[0.5, 1.0], guidance_scale=4.0, proximity=0.0)
    many = find(pair, strength=[0.4, 0.5, 0.7, 1.0], guidance_scale=[1.0, 4.0], proximity=0.0)
    assert (many.l2 <= few.l2 + 1e-9).all()
    assert (many.l2 < few.l2).any()


def test_a_picture_of_the_class_already_is_left_as_it_is(pair):
    pair.unet.calls = 0
    found = find(pair, -PICTURES[:1], 1, return_intermediates=True)
    assert pair.unet.calls == 0
    torch.testing.assert_close(found.images, -PICTURES[:1])
    assert (found.l2, found.strengths, found.original_labels) == (0, 0, 1)
    assert all(torch.equal(frame, found.images) for frame in found.intermediates)


def test_an_impossible_search_gives_the_likeliest_and_says_so(pair):
    found = find(pair, strength=0.1, guidance_scale=[0.01, 0.1], proximity=0.0)
    assert (found.probabilities < 0.99).all()
    assert (found.scales == 0.1).all()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_without_guidance_the_way_back_ends_at_the_picture(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    model = ExactModel(kind, (1, 3)).attach(Pair(scheduler.alphas_cumprod))
    inversion = Inversion(PICTURES, scheduler, 10, 0.0)
    sampling = unguided(model, scheduler, 10)
    inversion.invert(sampling)
    for level in (1, 5, 10):
        torch.testing.assert_close(inversion.draw(sampling, level, torch.arange(3))[-1], PICTURES)


def test_the_noise_of_pictures_is_unit_normal_in_the_limit(pair):
    """DDIM's map of N(m, s²) to N(0, 1) is x -> (x - m)/s, here of the class's first component alone."""
    mixture = Pair(pair.scheduler.alphas_cumprod)
    mixture.weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    pair.unet.attach(mixture)
    inversion = Inversion(PICTURES, pair.scheduler, 500, 0.0)
    inversion.invert(unguided(pair.unet, pair.scheduler, 500))
    expected = (PICTURES.flatten(1) - Pair.means[0]) / Pair.scale
    torch.testing.assert_close(inversion.states[-1].flatten(1), expected, rtol=0.02, atol=0.02)


def test_the_film_runs_from_the_picture_to_the_image(pair):
    found = find(pair, return_intermediates=True)
    assert len(found.intermediates) == 21
    film = torch.stack(found.intermediates)
    torch.testing.assert_close(film[0], PICTURES)
    assert torch.equal(film[-1], found.images)
    still = (film == film[0]).flatten(2).all(dim=2).sum(dim=0)
    assert still.tolist() == [21 - round(strength * 20) for strength in found.strengths.tolist()]


# --- with networks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    return make_pipeline()


NETWORKS = {"num_inference_steps": 4, "confidence": 0.4, "strength": [0.5, 1.0], "guidance_scale": [20.0, 200.0]}


@pytest.mark.parametrize("inference", [False, True])
def test_a_batch_equals_its_images_one_by_one(pipe, inference):
    pictures, labels = torch.rand(3, 1, 8, 8), ["fox", "cat", "dog"]
    with torch.inference_mode(inference):
        together = pipe.counterfactual(pictures, labels, output_type="pt", **NETWORKS)
        for i in range(3):
            alone = pipe.counterfactual(pictures[i : i + 1], labels[i], output_type="pt", **NETWORKS)
            torch.testing.assert_close(together.images[i : i + 1], alone.images, rtol=1e-3, atol=1e-4)
            assert together.strengths[i] == alone.strengths[0]


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_the_pipelines_scheduler_says_the_levels_alone(pipe, scheduler):
    pictures = torch.rand(2, 1, 8, 8)
    expected = pipe.counterfactual(pictures, [0, 1], output_type="pt", **NETWORKS).images
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    images = pipe.counterfactual(pictures, [0, 1], output_type="pt", **NETWORKS).images
    torch.testing.assert_close(images, expected, rtol=0, atol=5e-3)  # its levels are float32


@pytest.mark.parametrize("unet", [{"channels": 2}, {"num_class_embeds": 3}])
def test_learned_variances_and_class_embeddings(unet):
    output = make_pipeline(**unet).counterfactual(torch.rand(2, 1, 8, 8), 1, **NETWORKS)
    assert [picture.size for picture in output.images] == [(8, 8), (8, 8)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": torch.rand(1, 1, 8, 9)}, "`image` must have 1 channels"),
        ({"image": torch.full((1, 1, 8, 8), torch.nan)}, "`image` must be in"),
        ({"image": torch.rand(2, 1, 8, 8), "class_labels": [0, 1, 2]}, "`image` must be one for all or one for each"),
        ({"class_labels": 7}, "`class_labels` must be between"),
        ({"class_labels": torch.full((1, 3), 1 / 3)}, "`class_labels` must be classes"),
        ({"strength": 1.5}, "`strength` must be one number or several"),
        ({"strength": []}, "`strength` must be one number or several"),
        ({"strength": float("nan")}, "`strength` must be one number or several"),
        ({"guidance_scale": [1.0, -1.0]}, "`guidance_scale` must be one number or several"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be one number or several"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be"),
        ({"confidence": 1.0}, "`confidence` must be a probability"),
        ({"proximity": 1.0}, "`proximity` must be in"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
    ],
)
def test_a_bad_search_is_one_sentence_before_a_model_runs(pipe, arguments, words):
    pipe.classifier.register_forward_hook(lambda *_: pytest.fail("the classifier ran"))
    with pytest.raises(ValueError, match=words):
        pipe.counterfactual(**{"image": torch.rand(1, 1, 8, 8), "class_labels": 0, **arguments})


def test_pipelines_that_cannot_search_are_refused(pipe):
    unguided = ClassifierGuidedPipeline(pipe.unet, None, pipe.scheduler, id2label={0: "a"})
    with pytest.raises(ValueError, match="needs a classifier"):
        unguided.counterfactual(torch.rand(1, 1, 8, 8), 0)
    pipe.classifier.register_to_config(noise_schedule=None)
    scheduler = AnnealedLangevinScheduler(10, 0.1, 8.0, prediction_type=SCHEDULE["prediction_type"])
    with pytest.raises(ValueError, match="DDPM family"):
        ClassifierGuidedPipeline(pipe.unet, pipe.classifier, scheduler).counterfactual(torch.rand(1, 1, 8, 8), 0)
