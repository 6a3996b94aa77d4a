"""Guidance away from a worse prediction: with exact models it is classifier guidance, by Bayes' rule."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from gaussian_mixture import ExactClassifier, ExactModel, Mixture
from torch import Tensor

from hfdiff import ClassifierGuidedPipeline, DDIMScheduler, DDPMScheduler
from hfdiff.pipelines.classifier_free import extrapolate

LEVELS = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
MIXTURE = Mixture(LEVELS.alphas_cumprod)
NAMES = {0: "left", 1: "right"}


class ConditionalModel(ExactModel):
    """The exact noise of each class, and of no class where it is told the last embedding."""

    @register_to_config
    def __init__(
        self, num_class_embeds: int = 3, blind: bool = False, sample_size: tuple = (1, 2), in_channels: int = 1
    ):
        torch.nn.Module.__init__(self)
        self.register_buffer("reference", torch.zeros((), dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.calls += 1
        alpha_bar = MIXTURE.alpha_bar_at(timestep).reshape(-1, 1)
        rows = []
        for row, label in zip(sample, class_labels.tolist()):
            told = None if label == 2 or self.config.blind else label
            mean = MIXTURE.posterior_mean(row[None], timestep, told)
            rows.append((row.flatten() - alpha_bar**0.5 * mean) / (1 - alpha_bar) ** 0.5)
        return SimpleNamespace(sample=torch.cat(rows).view_as(sample))


def make_pipeline(model: ExactModel, classifier: ExactClassifier | None = None, **options):
    pipe = ClassifierGuidedPipeline(model, classifier, DDIMScheduler.from_config(LEVELS.config), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CONDITIONAL = make_pipeline(ConditionalModel().attach(MIXTURE), id2label=NAMES)
GUIDED = make_pipeline(ExactModel().attach(MIXTURE), ExactClassifier(id2label=NAMES).attach(MIXTURE))


def draw(pipe, labels=(0, 1, 1), scale=None, steps: int = 12, **options) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(list(labels), scale, steps, generator=generator, output_type="latent", **options).images


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_with_exact_models_it_is_classifier_guidance_of_the_same_scale(scale: float) -> None:
    torch.testing.assert_close(draw(CONDITIONAL, classifier_free_scale=scale), draw(GUIDED, scale=scale))


def test_the_interval_is_that_of_the_classifier_but_for_the_class_that_the_unet_is_told() -> None:
    inside = {"guidance_interval": (0.3, 0.6)}
    both = draw(CONDITIONAL, classifier_free_scale=3.0, **inside)
    told = draw(GUIDED, scale=lambda progress: 3.0 if 0.3 <= progress <= 0.6 else 1.0)
    torch.testing.assert_close(both, told)


def test_with_a_classifier_both_scales_add_up() -> None:
    """Told the class, a UNet has p(y | x) once; s - 1 more of it and w of the classifier's make s + w."""
    pipe = make_pipeline(ConditionalModel().attach(MIXTURE), ExactClassifier(id2label=NAMES).attach(MIXTURE))
    torch.testing.assert_close(draw(pipe, scale=1.5, classifier_free_scale=2.0), draw(GUIDED, scale=3.5))


def test_a_weaker_model_that_is_blind_to_the_class_is_as_good_as_no_class() -> None:
    weak = ConditionalModel(blind=True).attach(MIXTURE)
    away = draw(CONDITIONAL, weak_unet=weak, autoguidance_scale=2.5)
    torch.testing.assert_close(away, draw(CONDITIONAL, classifier_free_scale=2.5))
    assert weak.calls == 12


def test_off_costs_no_call_and_changes_no_bit() -> None:
    CONDITIONAL.unet.calls = 0
    plain = draw(CONDITIONAL)
    assert CONDITIONAL.unet.calls == 12
    assert torch.equal(plain, draw(CONDITIONAL, classifier_free_scale=1.0, autoguidance_scale=1))


def test_a_batch_equals_its_images_one_by_one() -> None:
    weak = ConditionalModel(blind=True).attach(MIXTURE)
    pipe = make_pipeline(ConditionalModel().attach(MIXTURE), ExactClassifier(id2label=NAMES).attach(MIXTURE))

    def run(labels: list[int], seeds: list[int], scale: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"classifier_free_scale": 2.5, "weak_unet": weak, "autoguidance_scale": 1.5}
        options |= {"guidance_interval": (0.2, 0.8), "eta": 1.0, "num_particles": 2}
        return pipe(labels, scale, 6, generator=generators, output_type="latent", **options).images

    labels, scale = [0, 1, 1], torch.tensor([1.0, 2.0, 0.0])
    whole = run(labels, [3, 4, 5], scale)
    for index, label in enumerate(labels):
        torch.testing.assert_close(run([label], [3 + index], scale[index : index + 1])[0], whole[index])


def test_extrapolation_goes_away_from_each_reference() -> None:
    m, first, second = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([5.0])
    assert extrapolate(m, [(2.0, first), (1.5, second)]).item() == 3 + 2 - 1


def test_scales_without_what_they_need_are_refused_before_the_models_run() -> None:
    calls = CONDITIONAL.unet.calls, GUIDED.unet.calls
    other = ConditionalModel(num_class_embeds=5).attach(MIXTURE)
    for pipe, options, words in [
        (GUIDED, {"classifier_free_scale": 2.0}, "needs a class-conditional UNet .* got 2.0 with no embeddings"),
        (make_pipeline(ConditionalModel(2).attach(MIXTURE)), {"classifier_free_scale": 2}, "one more embedding"),
        (CONDITIONAL, {"classifier_free_scale": -1.0}, "`classifier_free_scale` must be a finite number"),
        (CONDITIONAL, {"autoguidance_scale": 2.0}, "`autoguidance_scale` and `weak_unet` need each other"),
        (CONDITIONAL, {"weak_unet": other}, "`autoguidance_scale` and `weak_unet` need each other"),
        (CONDITIONAL, {"weak_unet": other, "autoguidance_scale": 2.0}, "`weak_unet` must have the UNet's num_class"),
    ]:
        with pytest.raises(ValueError, match=words):
            draw(pipe, **options)
    assert calls == (CONDITIONAL.unet.calls, GUIDED.unet.calls)
