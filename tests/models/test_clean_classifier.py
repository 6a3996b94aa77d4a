"""Classifiers of clean images as guides: their preprocessing, saving, and opening without hfdiff."""

import json
from pathlib import Path

import pytest
import torch
from hub_process import Absent
from tiny_models import make_judge, make_pipeline
from tiny_training import context, finish
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hfdiff import ClassifierGuidedPipeline, CleanClassifier, GuidanceMethod

NORMALISED = {"image_mean": [0.2, 0.4, 0.6], "image_std": [0.5, 0.25, 0.3], "do_rescale": True, "do_normalize": True}
WHOLE = {**NORMALISED, "image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}, "resample": 2}
CROPPED = {
    **NORMALISED,
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 12, "width": 12},
    "do_center_crop": True,
    "do_resize": True,
    "resample": 3,
}
NAMES = {0: "cat", 1: "dog", 2: "fox"}


def make_vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=12, patch_size=4, id2label=NAMES, label2id={n: i for i, n in NAMES.items()})
    return ViTForImageClassification(config).eval()


def make_resnet() -> ResNetForImageClassification:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ViT with its processor."""
    make_vit().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(WHOLE))
    return tmp_path / "vit"


def images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 40), (20, 28)])
@pytest.mark.parametrize("settings", [WHOLE, CROPPED], ids=["whole", "cropped"])
def test_preprocessing_is_that_of_the_image_processor(settings: dict, height: int, width: int, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pictures = images(3, 3, height, width) // 3 + 80  # a cubic filter goes beyond 0 and 255, where theirs clip
    expected = processor(images=list(pictures.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
    for given in (processor, tmp_path, settings):
        ours = CleanClassifier(make_vit(), given).preprocess(pictures / 127.5 - 1)
        rounding = 1.5 / 255 / 0.25  # theirs are bytes after resizing, once for each side
        torch.testing.assert_close(ours, expected.float(), atol=rounding, rtol=0)


def test_grey_images_are_repeated_and_every_pixel_has_its_gradient() -> None:
    classifier = CleanClassifier(make_vit().double(), WHOLE)
    grey = images(2, 1, 8, 8).double() / 127.5 - 1
    torch.testing.assert_close(classifier(grey).logits, classifier(grey.expand(-1, 3, -1, -1)).logits)
    assert torch.autograd.gradcheck(lambda x0: classifier(x0).logits, grey[:1].requires_grad_(), atol=1e-4)


def test_names_and_classes_are_the_models(folder: Path) -> None:
    classifier = CleanClassifier(folder)
    assert classifier.id2label == NAMES
    assert classifier.config.num_classes == 3
    guided = make_pipeline()
    pipe = ClassifierGuidedPipeline(guided.unet, classifier, guided.scheduler)
    assert (pipe.id2label, pipe.num_classes) == (NAMES, 3)


@pytest.mark.parametrize("kind", ["vit", "resnet", "judge"])
def test_saved_and_reopened_it_is_the_same(kind: str, tmp_path: Path) -> None:
    model = {"vit": make_vit, "resnet": make_resnet, "judge": make_judge}[kind]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    options = {} if kind == "judge" else {"processor": WHOLE}
    classifier = CleanClassifier(model, guidance_scale=3.0, **options)
    classifier.save_pretrained(tmp_path)
    again = CleanClassifier.from_pretrained(tmp_path)
    x0 = images(4, 1, 8, 8) / 127.5 - 1
    assert torch.equal(again(x0).logits, classifier(x0).logits)
    assert (again.id2label, again.config.guidance_scale) == (classifier.id2label, 3.0)
    assert not again.training
    if kind == "judge":
        torch.testing.assert_close(classifier(x0).logits, model.eval()(x0, 0).logits)


def test_a_softplus_is_near_the_relu_and_is_saved(tmp_path: Path) -> None:
    resnet = make_resnet()
    x0 = images(4, 1, 8, 8) / 127.5 - 1
    plain = CleanClassifier(resnet, WHOLE)(x0).logits
    sharp, smooth = (CleanClassifier(make_resnet(), WHOLE, softplus_beta=beta) for beta in (1e4, 3.0))
    for classifier in (sharp, smooth):
        classifier.network.load_state_dict(resnet.state_dict())
        assert not any(isinstance(module, nn.ReLU) for module in classifier.modules())
    torch.testing.assert_close(sharp(x0).logits, plain, atol=1e-3, rtol=0)
    assert (smooth(x0).logits - plain).abs().max() > 1e-3
    smooth.save_pretrained(tmp_path)
    assert torch.equal(CleanClassifier.from_pretrained(tmp_path)(x0).logits, smooth(x0).logits)
    with pytest.raises(ValueError, match="`softplus_beta` must be above 0, for a model with ReLUs, got 3 and 0 ReLUs"):
        CleanClassifier(make_vit(), WHOLE, softplus_beta=3)


# --- in a pipeline ---------------------------------------------------------------------------------------------------


def with_vit(folder: Path) -> ClassifierGuidedPipeline:
    guided = make_pipeline()
    return ClassifierGuidedPipeline(guided.unet, CleanClassifier(folder, guidance_scale=20.0), guided.scheduler)


def draw(pipe, **options) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(["cat", "dog"], num_inference_steps=4, generator=generator, output_type="pt", **options).images


def draw_without_hfdiff(folder: Path, threads: int) -> None:
    import sys

    torch.set_num_threads(threads)  # other numbers of threads sum in another order
    for name in [name for name in sys.modules if name.partition(".")[0] == "hfdiff"]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent)
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe.classifier).__module__.startswith("diffusers_modules.")
    torch.save(draw(pipe), folder / "images.pt")
    pipe.save_pretrained(folder / "again")


def test_a_saved_pipeline_draws_the_same_also_without_hfdiff(folder: Path, tmp_path: Path) -> None:
    pipe = with_vit(folder)
    expected = draw(pipe)
    assert not torch.equal(expected, draw(pipe, guidance_scale=0.0))
    assert not torch.equal(expected, draw(pipe, method=GuidanceMethod.mpgd()))
    pipe.save_pretrained(tmp_path / "pipe")
    again = ClassifierGuidedPipeline.from_pretrained(tmp_path / "pipe")
    assert type(again.classifier) is CleanClassifier
    assert torch.equal(draw(again), expected)
    process = context.Process(target=draw_without_hfdiff, args=(tmp_path / "pipe", torch.get_num_threads()))
    process.start()
    assert finish([process]) == [0]
    assert torch.equal(torch.load(tmp_path / "pipe" / "images.pt"), expected)
    assert torch.equal(draw(ClassifierGuidedPipeline.from_pretrained(tmp_path / "pipe" / "again")), expected)


class Darkness(nn.Module):
    def forward(self, x0: Tensor) -> Tensor:
        return torch.stack([-x0.mean((1, 2, 3)), x0.mean((1, 2, 3))], dim=1)


def test_a_module_guides_but_is_not_saved(tmp_path: Path) -> None:
    guided = make_pipeline()
    classifier = CleanClassifier(Darkness(), id2label={0: "dark", 1: "bright"}, guidance_scale=300.0)
    pipe = ClassifierGuidedPipeline(guided.unet, classifier, guided.scheduler)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(["dark", "bright"], num_inference_steps=5, output_type="pt").images
    assert drawn[0].mean() < drawn[1].mean() - 0.1
    with pytest.raises(ValueError, match="`classifier` cannot be saved, got a Darkness"):
        pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="`model` must be a NoisyClassifier or of transformers to be saved"):
        classifier.save_pretrained(tmp_path / "classifier")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (3, {}, "`model` must be an image classifier or the folder or Hub id of one, got a int"),
        ("no/such-folder/here", {}, "`model` must be the folder or Hub id of an image classifier"),
        (make_vit, {}, "`processor` must be given for a ViTForImageClassification that comes from no folder"),
        (make_vit, {"processor": 5}, "`processor` must be an image processor or its settings, got a int"),
        (make_vit, {"processor": {"size": 8}}, r"`processor` must have an image_mean and an image_std, got \['size'\]"),
    ],
)
def test_what_is_no_classifier_or_lacks_its_processor_is_refused(model, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        CleanClassifier(model() if callable(model) else model, **options)


def test_colours_are_not_guided_by_a_classifier_of_grey_images() -> None:
    guided = make_pipeline()
    colours = type(guided.unet)(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(ValueError, match="`classifier` must take the UNet's 3 channels, got a classifier of 1"):
        ClassifierGuidedPipeline(colours, CleanClassifier(make_judge()), guided.scheduler)


def test_several_classifiers_are_of_noisy_images() -> None:
    guided = make_pipeline()
    with pytest.raises(ValueError, match="`classifier` must know noisy images where there are several, got a CleanCl"):
        ClassifierGuidedPipeline(guided.unet, {"clean": CleanClassifier(make_judge())}, guided.scheduler)
    several = ClassifierGuidedPipeline(guided.unet, {"noisy": guided.classifier}, guided.scheduler)
    for method in (GuidanceMethod.ed_dpm(), GuidanceMethod(joint_temperature=0.5)):
        with pytest.raises(ValueError, match="`method` changes the logits of one classifier"):
            several({"noisy": 0}, method=method)
