"""Several classifiers on one pipeline: on a mixture whose components have a kind and a style."""

from pathlib import Path

import pytest
import torch
from gaussian_mixture import ExactClassifier, ExactModel, Mixture
from torch import Tensor, nn

from hfdiff import (
    Both,
    ClassifierGuidedPipeline,
    ClassifierSet,
    DDIMScheduler,
    DDPMScheduler,
    Either,
    NoisyClassifier,
    Not,
)
from hfdiff.pipelines.guidance import classifier_gradient

LEVELS = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)


class Grouped(Mixture):
    """Four components of four dimensions; two kinds, three styles."""

    weights = torch.tensor([0.2, 0.3, 0.35, 0.15], dtype=torch.float64)
    means = torch.tensor(
        [[-0.9, 0.5, 0.6, -0.3], [0.8, 0.9, -0.5, 0.6], [0.5, -0.9, 0.5, -0.8], [-0.7, -0.6, -0.8, 0.5]],
        dtype=torch.float64,
    )
    scales = torch.tensor([0.7, 0.8, 0.75, 0.65], dtype=torch.float64)
    classes = torch.tensor([0, 1, 2, 3])


class Kinds(Grouped):
    classes = torch.tensor([0, 0, 1, 1])


class Styles(Grouped):
    classes = torch.tensor([0, 1, 0, 2])


ALPHA_BARS = LEVELS.alphas_cumprod
KIND = ExactClassifier(2, {0: "cat", 1: "dog"}).attach(Kinds(ALPHA_BARS))
STYLE = ExactClassifier(3, {0: "ink", 1: "oil", 2: "chalk"}).attach(Styles(ALPHA_BARS))


def make_pipeline(classifier) -> ClassifierGuidedPipeline:
    model = ExactModel(sample_size=(1, 4)).attach(Grouped(ALPHA_BARS))
    pipe = ClassifierGuidedPipeline(model, classifier, DDPMScheduler.from_config(LEVELS.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPE = make_pipeline({"kind": KIND, "style": STYLE})


def draw(pipe, labels, scale=None, count: int = 1, **options) -> Tensor:
    options = {"num_inference_steps": 8, "output_type": "latent"} | options
    if isinstance(labels, dict):
        labels = {name: [label] * count for name, label in labels.items()}
    return pipe(labels, scale, generator=torch.Generator().manual_seed(0), **options).images


def gradients(xt: Tensor) -> list[Tensor]:
    return [classifier_gradient(c, xt, 400, torch.tensor([0] * len(xt))) for c in (KIND, STYLE)]


def test_each_classifier_adds_its_gradient_by_its_scale() -> None:
    """The step at a timestep is linear in the guidance, so the shifts of the mean add up."""
    seen = {}

    def remember(pipe, index, timestep, tensors):
        seen[str(scale)] = tensors["latents"]
        pipe._interrupt = True
        return {}

    for scale in (
        {"kind": 0.0, "style": 0},
        {"kind": 2.0, "style": 0},
        {"kind": 0, "style": 0.5},
        {"kind": 2.0, "style": 0.5},
    ):
        draw(
            PIPE,
            {"kind": "cat", "style": "ink"},
            scale,
            timesteps=[800, 400, 0],
            num_inference_steps=3,
            callback_on_step_end=remember,
        )
    none, kind, style, both = seen.values()
    assert (kind - none).abs().max() > 1e-3
    torch.testing.assert_close(both - none, (kind - none) + (style - none))


def test_one_classifier_left_out_is_the_other_alone() -> None:
    alone = draw(make_pipeline(KIND), ["dog"], 1.5)
    torch.testing.assert_close(draw(PIPE, {"kind": "dog"}, 1.5), alone)
    torch.testing.assert_close(draw(PIPE, {"kind": Either("dog")}, {"kind": 1.5}), alone)
    torch.testing.assert_close(draw(PIPE, "dog", 1.5), alone)
    assert PIPE.id2label == {0: "cat", 1: "dog"}
    assert PIPE.num_classes == 2


def test_scales_of_zero_run_no_classifier() -> None:
    KIND.calls = STYLE.calls = 0
    draw(PIPE, {"kind": "cat", "style": "ink"}, {"kind": 0, "style": 0.0})
    assert KIND.calls == STYLE.calls == 0


def test_both_classifiers_with_a_corrector_draw_what_has_both() -> None:
    """p(x) p(kind | x) p(style | x), against points of the mixture weighted by it."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.multinomial(Grouped.weights, 300_000, replacement=True, generator=generator)
    noise = torch.randn(len(chosen), 4, generator=generator, dtype=torch.float64)
    x0 = Grouped.means[chosen] + Grouped.scales[chosen, None] * noise
    clean = torch.tensor(0)
    log_probs = [c.mixture.class_log_probs(x0, clean).log_softmax(-1)[:, 0] for c in (KIND, STYLE)]
    weights = sum(log_probs).softmax(0)
    mean = weights @ x0
    options = {"num_inference_steps": 50, "corrector_steps": 8, "corrector_accept": True}
    samples = draw(PIPE, {"kind": "cat", "style": "ink"}, 1.0, 1000, **options).flatten(1)
    assert (samples.mean(0) - mean).abs().max() < 0.1  # 4 standard errors of 0.8/√1000; without a corrector it is 0.39


def test_particles_weigh_by_all_classifiers() -> None:
    output = PIPE(
        {"kind": ["cat"] * 3, "style": ["ink", "oil", Both("chalk")]}, 1.0, num_particles=4, num_inference_steps=5
    )
    assert output.effective_sample_size.shape == (5, 3)


@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"corrector_steps": 2, "corrector_accept": True}])
def test_a_batch_equals_its_images_one_by_one(options: dict) -> None:
    labels = {"kind": ["cat", "dog", Not("cat")], "style": [Both("ink", "oil", weights=[2, 0.5]), "chalk", 0]}

    def run(labels: dict, *seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        scale = {"kind": 2.0, "style": 0.5}
        return PIPE(labels, scale, 6, generator=generators, output_type="latent", **options).images

    whole = run(labels, 3, 4, 5)
    for index in range(3):
        own = {name: [given[index]] for name, given in labels.items()}
        torch.testing.assert_close(run(own, 3 + index)[0], whole[index])


def test_each_image_may_have_scales_of_its_own() -> None:
    """Images of a batch are those drawn alone with their numbers; zeros draw what is drawn without labels."""
    kind, style = [2.0, 0.5, 0.0], [0.5, 0.0, 0.0]

    def run(seeds: list[int], scale: dict | None) -> Tensor:
        labels = {"kind": ["cat"] * len(seeds), "style": ["ink"] * len(seeds)} if scale else None
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = PIPE(labels, scale, 6, generator=generators, batch_size=len(seeds), output_type="latent")
        return output.images

    whole = run([3, 4, 5], {"kind": torch.tensor(kind), "style": torch.tensor(style)})
    for index in range(3):
        alone = run([3 + index], {"kind": kind[index], "style": style[index]})
        torch.testing.assert_close(whole[index], alone[0])
    torch.testing.assert_close(whole[2], run([5], None)[0])


def tiny(names: list[str], scale: float) -> NoisyClassifier:
    torch.manual_seed(len(names))
    classifier = NoisyClassifier(
        8, 1, len(names), 8, (1,), attention_downsamples=(), num_head_channels=8, norm_num_groups=4,
        id2label=dict(enumerate(names)), guidance_scale=scale,
    )  # fmt: skip
    for parameter in classifier.parameters():
        nn.init.normal_(parameter, std=0.2)
    return classifier.eval()


def test_a_set_saves_opens_and_guides_the_same(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    parts = {"kind": tiny(["cat", "dog"], 2.0), "style": tiny(["ink", "oil", "chalk"], 3.0)}
    pipe = ClassifierGuidedPipeline(unet, parts, DDIMScheduler())
    assert isinstance(pipe.classifier, ClassifierSet)
    pipe.save_pretrained(tmp_path)
    again = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    assert list(again.classifier.members) == ["kind", "style"]
    labels = {"kind": ["cat", "dog"], "style": ["chalk", "ink"]}
    draws = [
        p(labels, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipe, again, ClassifierGuidedPipeline(**pipe.components))
    ]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    by_name = pipe(
        labels, {"kind": 2.0, "style": 3.0}, num_inference_steps=3, generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images  # fmt: skip
    assert torch.equal(draws[0], by_name)  # each has its own default


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    calls = PIPE.unet.calls
    for labels, scale, words in [
        ({"colour": "red"}, None, r"`class_labels` must name classifiers among \['kind', 'style'\], got \['colour'\]"),
        ({"kind": "ink"}, None, "names among"),
        ("ink", None, "names among"),
        ({"kind": "cat"}, {"colour": 2.0}, "`guidance_scale` must name classifiers"),
        ({"kind": "cat"}, {"kind": -1.0}, "`guidance_scale` of 'kind' must be a finite number"),
        ({"kind": "cat"}, torch.ones(1, 1), "`guidance_scale` of 'kind' must be"),
        ({"kind": "cat"}, {"kind": torch.tensor([-1.0])}, "`guidance_scale` of 'kind' must be a finite number"),
        ({"kind": "cat"}, {"kind": torch.ones(2)}, "`guidance_scale` of 'kind' must be one number, or one per image"),
        ({}, None, "`class_labels` must be a dictionary by classifier"),
        ({"kind": 2}, None, "`class_labels` must be between 0 and 2 - 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            draw(PIPE, labels, scale)
    with pytest.raises(ValueError, match=r"`class_labels` of 'kind' must be classes .* got probabilities"):
        PIPE({"kind": torch.tensor([[0.5, 0.5]])})
    with pytest.raises(ValueError, match="as many for each classifier"):
        PIPE({"kind": ["cat"], "style": ["ink", "oil"]})
    with pytest.raises(ValueError, match="`classifier` must name at least one"):
        make_pipeline({})
    with pytest.raises(ValueError, match="`classifier` must tell its `num_classes`"):
        make_pipeline({"a": nn.Identity()})({"a": [0]})
    with pytest.raises(ValueError, match="can be saved where all are of"):
        PIPE.classifier.save_pretrained(tmp_path)
    assert calls == PIPE.unet.calls
