"""Trainings that start from what is there: another's weights, what a folder tells, another number of processes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from trainings import load_training

from hfdiff import AnnealedLangevinScheduler, ClassifierGuidedPipeline, NCSNPipeline, NCSNv2Model, NoisyClassifier, cli
from hfdiff.data.labelled import LabelledImages, load_images
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.batches import BatchStream
from hfdiff.training.checkpoints import with_global_batch
from hfdiff.training.diffusion_model import open_diffusion_model
from hfdiff.training.levels import choose_levels
from hfdiff.training.unet import with_classes, without_classes

QUICK = ["--max_train_steps", "1", "--train_batch_size", "4", "--report_to", "none", "--lr_warmup_steps", "0"]
NO_STEP = [*QUICK, "--learning_rate", "1e-12"]  # one that leaves the weights as they are
UNMEASURED = ["--sample_images", "2", "--sample_steps", "2", "--bits_per_dim_images", "0"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures of 12 by 10 pixels in a folder per class, and the same with the classes in their names."""
    path, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (path / "classes" / kind).mkdir(parents=True)
        (path / "names").mkdir(exist_ok=True)
        for index in range(6):
            picture = Image.fromarray(random.integers(256, size=(12, 10), dtype=np.uint8))
            picture.save(path / "classes" / kind / f"{index}.png")
            picture.save(path / "names" / f"{kind}_{index}.png")
    return path


@pytest.fixture(scope="module")
def conditional(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional diffusion model of those pictures, of 8 pixels."""
    folder = tmp_path_factory.mktemp("conditional")
    flags = ["--train_data_dir", str(pictures / "classes"), "--resolution", "8", "--class_conditional"]
    sizes = ["--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--attention_head_dim", "8"]
    flags += ["--num_train_timesteps", "20", "--prediction_type", "v_prediction", *sizes, "--output_dir", str(folder)]
    load_training("ddpm").main([*QUICK, *UNMEASURED, *flags])
    return folder


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_class_conditional_model_is_drawn_by_class(conditional: Path, tmp_path: Path, command: str) -> None:
    judge = NoisyClassifier(8, 1, 2, 8, (1,), attention_downsamples=(), num_head_channels=8, norm_num_groups=4)
    judge.save_pretrained(tmp_path / "judge")
    if command == "sample":
        drawn = tmp_path / "samples.npz"
        flags = ["--pipeline", str(conditional), "--class_labels", "dog", "cat", "--output", str(drawn)]
    else:
        drawn = tmp_path / "set" / "samples.npz"
        flags = ["--samples", str(conditional), "--num_images", "2", "--class_labels", "dog", "cat", "--metrics", "is"]
        flags += ["--features", f"classifier:{tmp_path / 'judge'}", "--samples_dir", str(drawn.parent)]
    assert cli.main([command, *flags, "--num_inference_steps", "2"]) == 0
    assert np.load(drawn)["arr_1"].tolist() == [1, 0]
    pipe = ClassifierGuidedPipeline.from_pretrained(conditional)
    assert pipe.id2label == {0: "cat", 1: "dog"}
    assert "pipe(['cat']" in (conditional / "README.md").read_text()


def test_the_last_line_says_what_was_made_and_what_to_do_next(
    conditional: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--train_data_dir", str(pictures / "classes"), "--init_from", str(conditional)]
    load_training("ddpm").main([*NO_STEP, *UNMEASURED, *flags, "--output_dir", str(tmp_path / "again")])
    last = capsys.readouterr().out.splitlines()[-1]
    next_step = f"`hfdiff sample --pipeline {tmp_path / 'again'} --class_labels cat`"
    assert last == f"{tmp_path / 'again'}: a pipeline, 0.0M parameters; {next_step}"
    # what the folder told: classes, levels, prediction, architecture, size, and the weights themselves
    before, after = (load_file(folder / WEIGHTS) for folder in (conditional, tmp_path / "again"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-9, rtol=0)
    configs = [folder / "scheduler/scheduler_config.json" for folder in (conditional, tmp_path / "again")]
    first, second = (json.loads(path.read_text()) for path in configs)
    assert first == second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--prediction_type", "sample"],
            "`prediction_type` must be that of `init_from`, 'v_prediction', got 'sample'",
        ),
        (["--block_out_channels", "[32,64]"], r"`block_out_channels` must be that of `init_from`, \(8, 16\)"),
        (["--init_from", "nowhere/at/all"], "`init_from` must be"),
    ],
)
def test_what_a_model_tells_is_not_given_otherwise(
    conditional: Path, pictures: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    usual = ["--train_data_dir", str(pictures / "classes"), "--init_from", str(conditional)]
    with pytest.raises(ValueError, match=message):
        load_training("ddpm").main([*NO_STEP, *usual, *flags, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_any_unet_of_diffusers_is_a_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "alone")
    DDPMPipeline(unet, DDPMScheduler(30, prediction_type="sample")).save_pretrained(tmp_path / "pipeline")
    for name, kind in (("alone", "epsilon"), ("pipeline", "sample")):
        flags = ["--init_from", str(tmp_path / name), "--output_dir", str(tmp_path / f"{name}-tuned")]
        load_training("ddpm").main([*NO_STEP, *UNMEASURED, *flags])
        pipe = DDPMPipeline.from_pretrained(tmp_path / f"{name}-tuned")
        assert pipe.scheduler.config.prediction_type == kind
        assert [*pipe.unet.config.down_block_types] == [*unet.config.down_block_types]
        torch.testing.assert_close(pipe.unet.conv_in.weight, unet.conv_in.weight, atol=1e-9, rtol=0)


def test_a_score_network_is_a_start_for_another(tmp_path: Path) -> None:
    model = NCSNv2Model(8, 1, 8, num_levels=6, sigma_max=1.0, rescaled=True)
    NCSNPipeline(model, AnnealedLangevinScheduler(6, 0.01, 1.0, steps_per_level=1)).save_pretrained(tmp_path / "first")
    flags = ["--init_from", str(tmp_path / "first"), "--sample_images", "0", "--output_dir", str(tmp_path / "second")]
    load_training("ncsn").main([*NO_STEP, *flags])
    pipe = NCSNPipeline.from_pretrained(tmp_path / "second")
    assert len(pipe.scheduler) == 6
    torch.testing.assert_close(pipe.unet.net.conv_in.weight, model.net.conv_in.weight, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="`init_from` must be a diffusion model, got NCSNv2Model"):
        load_training("ddpm").main([*NO_STEP, "--init_from", str(tmp_path / "first")])


def test_a_classifier_takes_size_channels_and_names_from_the_model_to_guide(
    conditional: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--train_data_dir", str(pictures / "names"), "--labels_from_names", "--diffusion_model", str(conditional)]
    sizes = ["--model_channels", "8", "--channel_mult", "[1]", "--attention_downsamples", "[]", "--sample_images", "0"]
    sizes += ["--num_head_channels", "8", "--norm_num_groups", "4"]
    load_training("classifier").main([*QUICK, *flags, *sizes, "--output_dir", str(tmp_path / "guided")])
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "guided")
    assert pipe.classifier.config.sample_size == 8
    assert pipe.id2label == {0: "cat", 1: "dog"}
    assert pipe.default_guidance_scale == 8
    assert capsys.readouterr().out.splitlines()[-1].endswith("--class_labels cat`")
    # a classifier that is part of a guided pipeline is a start as well
    again = ["--train_data_dir", str(pictures / "classes"), "--init_from", str(tmp_path / "guided")]
    load_training("classifier").main([*NO_STEP, *again, "--output_dir", str(tmp_path / "alone")])
    alone = NoisyClassifier.from_pretrained(tmp_path / "alone")
    torch.testing.assert_close(alone.time_embed[0].weight, pipe.classifier.time_embed[0].weight, atol=1e-9, rtol=0)


def test_grey_pictures_are_colour_ones_to_a_model_of_colours(pictures: Path) -> None:
    assert load_images(str(pictures / "classes"), resolution=8).images.shape == (12, 1, 8, 8)
    coloured = load_images(str(pictures / "classes"), resolution=8, channels=3).images
    assert coloured.shape == (12, 3, 8, 8)
    assert torch.equal(coloured[3][0], coloured[3][2])


def test_a_folder_says_how_labels_are_given(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"one folder of images per class.*class_name\.png, with `--labels_from_names`"
    ):
        load_images(str(pictures / "names"), label_column="label")
    named = load_images(str(pictures / "names"), label_column="label", labels_from_names=True, resolution=8)
    assert named.label_names == ["cat", "dog"]
    assert named.labels.tolist() == [0] * 6 + [1] * 6
    Image.new("L", (8, 8)).save(tmp_path / "nameless.png")
    with pytest.raises(ValueError, match=r"files named like class_name\.png, got 'nameless.png'"):
        load_images(str(tmp_path), label_column="label", labels_from_names=True)
    with pytest.raises(ValueError, match=r'must have the split asked for: Unknown split "test".*put those images into'):
        load_images(str(pictures / "classes"), "test")


def test_what_is_measured_is_spread_over_a_set_sorted_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half is far from the first one, which alone spans a small distance."""
    images = torch.cat([torch.zeros(50, 1, 2, 2), torch.ones(50, 1, 2, 2)])
    data = LabelledImages(images, torch.arange(100), ["a"])
    assert data.spread(4).labels.tolist() == [0, 33, 66, 99]
    assert len(data.spread(1000).images) == 100
    monkeypatch.setattr("hfdiff.training.levels.MOST_IMAGES", 10)
    assert choose_levels(data, 0.01, "auto", 5).sigma_max == 2  # √4


def test_the_same_batches_over_other_processes_are_the_same_run() -> None:
    one, two = ({"train_batch_size": 64 // n, "num_processes": n, "seed": 0} for n in (1, 2))
    assert with_global_batch(one) == with_global_batch(two) == {"seed": 0, "images_per_batch": 64}


def test_a_bundled_model_opens_by_its_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> SimpleNamespace:
        raise ConnectionError("no network")

    monkeypatch.setattr("hfdiff.pipelines.hub_download.download", unreachable)
    model = open_diffusion_model("hfdiff/mnist-classifier-guided")
    assert (model.size, model.channels) == (28, 1)
    assert model.scheduler.config.beta_schedule == "squaredcos_cap_v2"


# --- a teacher: a class-conditional model that also draws without a class --------------------------------------------

SIZES = ["--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--attention_head_dim", "8"]


@pytest.fixture(scope="module")
def plain_and_teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An unconditional model of the digits, and one with classes that started from it."""
    plain, teacher = (tmp_path_factory.mktemp(name) for name in ("plain", "teacher"))
    load_training("ddpm").main([*QUICK, *UNMEASURED, *SIZES, "--num_train_timesteps", "20", "--output_dir", str(plain)])
    flags = ["--class_conditional", "--class_dropout", "0.5", "--init_from", str(plain), "--learning_rate", "0.05"]
    load_training("ddpm").main([*QUICK, *UNMEASURED, *flags, "--output_dir", str(teacher)])
    return plain, teacher


def test_a_model_without_classes_learns_them_from_where_it_is(plain_and_teacher: tuple[Path, Path]) -> None:
    unet = UNet2DModel.from_pretrained(plain_and_teacher[0], subfolder="unet")
    told = with_classes(unet, 11)
    xt, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 7, 19])
    with torch.no_grad():
        assert torch.equal(told(xt, t, class_labels=torch.tensor([0, 4, 10])).sample, unet(xt, t).sample)
        nn.init.normal_(told.class_embedding.weight)
        by_null = told(xt, t, class_labels=torch.full((3,), 10)).sample
        assert not torch.equal(by_null, told(xt, t, class_labels=torch.full((3,), 3)).sample)
        torch.testing.assert_close(without_classes(told)(xt, t).sample, by_null)


def test_dropped_classes_are_the_one_after_the_last() -> None:
    images, labels = torch.zeros(1000, 1, 2, 2), torch.arange(1000) % 4
    data = LabelledImages(images, labels, list("abcd"))
    whole, dropped = (BatchStream(data, 1000, 10, seed=0, class_dropout=share)(3) for share in (0.0, 0.3))
    assert torch.equal(whole.noise, dropped.noise)
    kept = dropped.labels != 4
    assert torch.equal(whole.labels[kept], dropped.labels[kept])
    assert 0.26 < 1 - kept.double().mean().item() < 0.34


@pytest.mark.parametrize("guides", ["the teacher itself", "another model"])
def test_a_classifier_learns_its_gradient_from_a_teacher(
    plain_and_teacher: tuple[Path, Path], tmp_path: Path, guides: str
) -> None:
    plain, teacher = plain_and_teacher
    flags = ["--teacher", str(teacher), "--guided_denoising_weight", "1", "--time_sampling", "log-snr"]
    if guides == "another model":
        flags += ["--diffusion_model", str(plain)]
    load_training("classifier").main([*QUICK, *flags, "--sample_images", "0", "--output_dir", str(tmp_path)])
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    assert pipe.unet.config.num_class_embeds is None
    xt, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 12])
    with torch.no_grad():
        if guides == "another model":
            expected = UNet2DModel.from_pretrained(plain, subfolder="unet")(xt, t).sample
        else:
            told = UNet2DModel.from_pretrained(teacher, subfolder="unet")
            expected = told(xt, t, class_labels=torch.tensor([10, 10])).sample
        torch.testing.assert_close(pipe.unet(xt, t).sample, expected)


def test_a_teacher_that_does_not_fit_is_refused(
    plain_and_teacher: tuple[Path, Path], conditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, teacher = map(str, plain_and_teacher)
    distil = ["--guided_denoising_weight", "1", *QUICK, "--output_dir", str(tmp_path)]
    for flags, words in [
        (["--teacher", plain, *distil], "`teacher` must be the pipeline of a class-conditional model"),
        (["--teacher", str(conditional), *distil], "`teacher` must be the pipeline of a class-conditional model"),
        (["--teacher", teacher, *QUICK], "`teacher` needs a `guided_denoising_weight`"),
    ]:
        with pytest.raises(SystemExit):
            cli.main(["train", "classifier", *flags])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "ddpm", "--class_dropout", "0.1"])
    assert "`class_dropout` needs `class_conditional`" in capsys.readouterr().err
