"""The papers' recipes: networks of their size, and how ADM's is trained, saved, started from and guided."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from trainings import load_training

from hfdiff import ADMUNet, ClassifierGuidedPipeline
from hfdiff.data.labelled import LabelledImages
from hfdiff.training.config import parse_settings
from hfdiff.training.geometry import ToldUNet
from hfdiff.training.settings import SETTINGS
from hfdiff.training.unet import with_classes, without_classes

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
QUICK = ["--max_train_steps", "1", "--train_batch_size", "4", "--report_to", "none", "--lr_warmup_steps", "0"]
UNMEASURED = ["--sample_images", "2", "--sample_steps", "2", "--bits_per_dim_images", "0"]
ADM = ["--architecture", "adm", "--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--num_heads", "2"]


@pytest.mark.parametrize(
    ("kind", "recipe", "size", "parameters"),
    [
        # ADM's counted in the original code, DDPM's the paper's 35.7M; NCSN++ has 62,693,251 there, another UNet
        ("ddpm", "cifar10-ddpm", 32, 35_746_307),
        ("ncsn", "cifar10-ncsnpp", 32, 58_687_747),
        ("ddpm", "imagenet64-adm", 64, 295_904_454),
        ("classifier", "imagenet64-adm-classifier", 64, 65_438_568),
        ("ddpm", "imagenet128-adm", 128, 421_529_606),
        ("classifier", "imagenet128-adm-classifier", 128, 42_568_040),
    ],
)
def test_a_papers_recipe_has_its_number_of_parameters(kind: str, recipe: str, size: int, parameters: int) -> None:
    path, training = RECIPES / f"{recipe}.yaml", load_training(kind)
    settings = parse_settings(SETTINGS[kind], ["--config", str(path)])
    data = LabelledImages(torch.zeros(1, 3, size, size), None, [str(number) for number in range(1000)])
    assert settings.resolution in (None, size)
    if kind == "classifier":
        make, others = training.make_classifier, (data, None, training.choose_levels(settings, None))
    elif kind == "ncsn":
        make, others = training.make_model, (training.make_scheduler(settings, data), data)
    else:
        make, others = training.make_unet, (data,)
    with torch.device("meta"):
        network = make(settings, *others)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert f"{parameters:,}" in path.read_text()


def test_the_settings_of_adm_128_are_the_network_of_its_checkpoint() -> None:
    settings = parse_settings(SETTINGS["ddpm"], ["--config", str(RECIPES / "imagenet128-adm.yaml")])
    data = LabelledImages(torch.zeros(1, 3, 128, 128), None, [str(number) for number in range(1000)])
    with torch.device("meta"):
        config = load_training("ddpm").make_unet(settings, data).config
    defaults = {name: parameter.default for name, parameter in inspect.signature(ADMUNet).parameters.items()}
    given = {name: config[name] for name in defaults if config[name] != defaults[name]}
    assert given == {
        "sample_size": 128, "out_channels": 6, "model_channels": 256, "channel_mult": (1, 1, 2, 3, 4),
        "num_res_blocks": 2, "attention_downsamples": (4, 8, 16), "num_heads": 4, "num_class_embeds": 1000,
    }  # fmt: skip


def small_adm() -> ADMUNet:
    """One whose output is not 0."""
    torch.manual_seed(0)
    unet = ADMUNet(
        sample_size=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1, 2), attention_downsamples=(),
        norm_num_groups=4,
    )  # fmt: skip
    torch.nn.init.normal_(unet.out[-1].weight)
    return unet


def test_adm_is_trained_saved_started_from_and_guided(tmp_path: Path) -> None:
    first, second, guided = (tmp_path / name for name in ("first", "second", "guided"))
    learned = ["--loss_type", "hybrid", "--variance_type", "learned_range"]
    ddpm, quick = load_training("ddpm").main, [*QUICK, *UNMEASURED, *learned]
    augmented = ["--augment_probability", "0.5", "--gradient_checkpointing", "--num_train_timesteps", "20"]
    ddpm([*quick, *ADM, *augmented, "--output_dir", str(first)])
    unet = DDPMPipeline.from_pretrained(first).unet
    assert isinstance(unet, ADMUNet)
    assert (unet.config.out_channels, unet.config.num_heads, unet.config.num_class_embeds) == (2, 2, None)

    start = [*quick, "--learning_rate", "1e-12", "--class_conditional", "--init_from", str(first)]
    with pytest.raises(ValueError, match="`num_heads` must be that of `init_from`, 2, got 4"):
        ddpm([*start, *ADM, "--num_heads", "4", "--output_dir", str(second)])
    ddpm([*start, "--output_dir", str(second)])
    before, after = (load_file(folder / WEIGHTS) for folder in (first, second))
    assert after.keys() - before.keys() == {"label_emb.weight"}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-9, rtol=0)

    classifier = ["--diffusion_model", str(second), "--sample_images", "0", "--output_dir", str(guided)]
    load_training("classifier").main([*QUICK, *classifier])
    assert ClassifierGuidedPipeline.from_pretrained(guided)([3], num_inference_steps=2).images[0].size == (8, 8)


def test_adm_with_classes_is_the_same_function_until_it_learns_them() -> None:
    unet = small_adm()
    xt, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 7, 19])
    told = with_classes(unet, 4)
    with torch.no_grad():
        assert torch.equal(told(xt, t, class_labels=torch.tensor([0, 1, 3])).sample, unet(xt, t).sample)
        torch.nn.init.normal_(told.label_emb.weight)
        by_null = told(xt, t, class_labels=torch.full((3,), 3)).sample
        torch.testing.assert_close(without_classes(told)(xt, t).sample, by_null)


def test_adm_is_told_how_its_pictures_were_changed_as_a_bias_of_its_time() -> None:
    unet = small_adm()
    told, label = ToldUNet(unet), torch.randn(1, 9)
    torch.nn.init.normal_(told.label_embedding.weight)
    xt, t = torch.randn(1, 1, 8, 8), torch.tensor([7])
    with torch.no_grad():
        given = told(xt, t, augment_labels=label).sample
        unet.time_embed[2].bias += told.label_embedding(label[0])
        torch.testing.assert_close(given, unet(xt, t).sample)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_heads", "2"], "`num_heads` needs the `architecture` \"adm\", got 2 with 'unet'"),
        ([*ADM, "--block_out_channels", "[8,20]"], "`block_out_channels` must be multiples of the first"),
        ([*ADM, "--num_heads", "3"], "`num_heads` must divide the widths with attention, got 3 for 16 channels"),
    ],
)
def test_sizes_that_no_adm_has_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as error:
        load_training("ddpm").main([*QUICK, *UNMEASURED, *flags, "--output_dir", str(tmp_path)])
    assert message in f"{error.value}{capsys.readouterr().err}"
