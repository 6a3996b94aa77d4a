"""The noisy classifier's script: what it refuses, what it saves, and that a resumed run ends with the same bits."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image
from trainings import load_training

from hfdiff.models.ncsnv2 import NCSNv2Model
from hfdiff.models.noisy_classifier import NoisyClassifier
from hfdiff.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from hfdiff.pipelines.pipeline_ncsn import NCSNPipeline
from hfdiff.schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.config import parse_settings
from hfdiff.training.diffusion_model import open_diffusion_model

TINY = [
    *("--train_batch_size", "8", "--max_train_steps", "4", "--lr_warmup_steps", "1", "--report_to", "none"),
    *("--checkpointing_steps", "2", "--logging_steps", "1"),
]
TINY_CLASSIFIER = [
    *("--model_channels", "8", "--channel_mult", "[1,2]", "--attention_downsamples", "[2]"),
    *("--num_head_channels", "8", "--norm_num_groups", "4", "--dropout", "0.3"),
]
SAMPLES = ["--guidance_scale", "3", "--sample_images", "2", "--sample_steps", "3"]
AUGMENTED = ["--shift_augmentation", "1", "--augment_probability", "0.5", "--random_flip", "--label_smoothing", "0.1"]


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return load_training("classifier")


def save_diffusion_model(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    size = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
    unet = UNet2DModel(
        **{**size, **changes}, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(60, beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion_model(tmp_path_factory.mktemp("diffusion"))


def save_score_network(folder: Path, *, rescaled: bool = True) -> Path:
    torch.manual_seed(0)
    levels = {"sigma_min": 0.1, "sigma_max": 9.0}
    model = NCSNv2Model(8, 1, 8, num_levels=20, rescaled=rescaled, **levels)
    NCSNPipeline(model, AnnealedLangevinScheduler(20, **levels, steps_per_level=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    NoisyClassifier(8, 1, 10, model_channels=8, num_head_channels=8, norm_num_groups=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(diffusion_model: Path, judge: Path) -> list[str]:
    model = ["--diffusion_model", str(diffusion_model), "--gradient_accumulation_steps", "2", "--judge", str(judge)]
    return [*TINY, *TINY_CLASSIFIER, *AUGMENTED, *model, *SAMPLES, "--validation_steps", "2"]


@pytest.fixture(scope="module")
def guided_pipeline(script: SimpleNamespace, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guided")
    script.main([*flags, "--output_dir", str(folder)])
    return folder


# --- what it saves ---------------------------------------------------------------------------------------------------


def test_the_guided_pipeline_knows_its_classes_noise_and_scale(guided_pipeline: Path) -> None:
    pipe = ClassifierGuidedPipeline.from_pretrained(guided_pipeline)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.classifier.config.noise_schedule["beta_schedule"] == "squaredcos_cap_v2"
    assert pipe.classifier.id2label == {digit: str(digit) for digit in range(10)}
    assert pipe.default_guidance_scale == pipe.classifier.config.guidance_scale == 3
    assert pipe(["3", "1"], num_inference_steps=2, output_type="pt").images.shape == (2, 1, 8, 8)


def test_the_classifier_of_a_score_network_guides_annealed_langevin_dynamics(
    script: SimpleNamespace, tmp_path: Path
) -> None:
    model = ["--diffusion_model", str(save_score_network(tmp_path / "ncsn")), *SAMPLES[:4], "--sample_steps", "30"]
    script.main([*TINY, *TINY_CLASSIFIER, *model, "--output_dir", str(tmp_path / "guided")])
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "guided")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, AnnealedLangevinScheduler)
    schedule = {"sigma_schedule": "geometric", "sigma_min": 0.1, "sigma_max": 9.0, "scale_input": False}
    assert pipe.classifier.config.noise_schedule == {"num_train_timesteps": 20, **schedule}
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [
        pipe([3, 1], scale, 30, torch.Generator().manual_seed(1), latents=noise, output_type="pt").images
        for scale in (0.0, 50.0)
    ]
    assert not torch.equal(*images)
    rows = json.loads((tmp_path / "guided" / "noise_levels.json").read_text())
    assert [(row["first_timestep"], row["last_timestep"]) for row in rows] == [(2 * i, 2 * i + 1) for i in range(10)]
    again = ["--init_classifier", str(tmp_path / "guided" / "classifier"), "--output_dir", str(tmp_path / "alone")]
    script.main([*TINY, *again, "--sample_images", "0"])
    assert NoisyClassifier.from_pretrained(tmp_path / "alone").config.noise_schedule["sigma_max"] == 9.0


def test_accuracy_loss_and_calibration_are_written_by_noise_and_along_the_way(guided_pipeline: Path) -> None:
    rows = json.loads((guided_pipeline / "noise_levels.json").read_text())
    assert [(row["first_timestep"], row["last_timestep"]) for row in rows] == [(6 * i, 6 * i + 5) for i in range(10)]
    assert all(row["num_images"] == 297 for row in rows)
    lines = [json.loads(line) for line in (guided_pipeline / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for measure in ("accuracy", "cross_entropy", "calibration_error"):  # the last are those of the model saved
        assert lines[-1][measure] == pytest.approx(sum(row[measure] for row in rows) / 10)
    assert lines[-1]["accuracy_0_5"] == rows[0]["accuracy"]
    assert (guided_pipeline / "noise_levels.csv").read_text().count("\n") == 11
    assert Image.open(guided_pipeline / "samples.png").size == (8 * (2 * 8 + 2), 8 * (10 * 10 - 2))


def test_the_card_loads_what_it_describes_and_repeats_the_run(
    script: SimpleNamespace, guided_pipeline: Path, flags: list[str], tmp_path: Path
) -> None:
    card = (guided_pipeline / "README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), names)
    assert names["image"].size == (8, 8)
    (tmp_path / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL).group(1))
    again = parse_settings(script.ClassifierSettings, ["--config", str(tmp_path / "recipe.yaml")])
    given = [*flags, "--output_dir", str(guided_pipeline), "--resolution", "8"]  # which the diffusion model told
    assert again == parse_settings(script.ClassifierSettings, given)
    assert "1,500 grey images of 8×8 pixels in 10 classes" in card
    assert "20 guided images, 3 steps at scale 3" in card
    assert "297 test images" in card


def test_a_resumed_run_with_dropout_accumulation_and_augmentation_ends_with_the_same_bits(
    script: SimpleNamespace, guided_pipeline: Path, flags: list[str], tmp_path: Path
) -> None:
    shutil.copytree(guided_pipeline / "checkpoint-2", tmp_path / "checkpoint-2")
    for log in ("log.jsonl", "validation.jsonl"):
        shutil.copy(guided_pipeline / log, tmp_path)
    script.main([*flags, "--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path)])
    files = ["classifier/diffusion_pytorch_model.safetensors", "log.jsonl", "validation.jsonl", "noise_levels.json"]
    for name in [*files, "samples.png"]:
        assert (guided_pipeline / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_second_stage_fits_the_gradient_from_an_earlier_classifier(
    script: SimpleNamespace, guided_pipeline: Path, diffusion_model: Path, tmp_path: Path
) -> None:
    start = ["--diffusion_model", str(diffusion_model), "--init_classifier", str(guided_pipeline / "classifier")]
    weights = ["--guided_denoising_weight", "1", "--classification_weight", "0"]
    script.main([*TINY, *start, *weights, "--sample_images", "0", "--output_dir", str(tmp_path)])
    before, after = (
        NoisyClassifier.from_pretrained(folder, subfolder="classifier") for folder in (guided_pipeline, tmp_path)
    )
    assert after.config.model_channels == before.config.model_channels
    assert after.config.dropout == 0
    assert not (tmp_path / "samples.png").exists()
    assert not torch.equal(before.time_embed[0].weight, after.time_embed[0].weight)


def test_without_a_diffusion_model_the_classifier_is_saved_alone_and_can_be_continued(
    script: SimpleNamespace, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    script.main([*TINY, *TINY_CLASSIFIER, "--num_train_timesteps", "100", "--output_dir", str(first)])
    classifier = NoisyClassifier.from_pretrained(first)
    assert classifier.config.noise_schedule["num_train_timesteps"] == 100
    assert classifier(torch.zeros(2, 1, 8, 8), 3).logits.shape == (2, 10)
    assert "image-classification" in (first / "README.md").read_text()
    script.main([*TINY, "--init_classifier", str(first), "--output_dir", str(second)])
    assert NoisyClassifier.from_pretrained(second).config.noise_schedule == classifier.config.noise_schedule


def test_a_bare_run_finds_the_diffusion_model_of_the_other_script(
    script: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = script.ClassifierSettings()
    assert settings.output_dir == "out/digits-classifier-guided"
    assert script.find_diffusion_model(settings) == settings
    assert "linear schedule" in capsys.readouterr().out
    (tmp_path / "out" / "digits-ddpm").mkdir(parents=True)
    (tmp_path / "out" / "digits-ddpm" / "model_index.json").touch()
    assert script.find_diffusion_model(settings).diffusion_model == "out/digits-ddpm"
    for other in ({"beta_schedule": "linear"}, {"dataset_name": "other"}, {"diffusion_model": "own"}):
        settings = script.ClassifierSettings(**other)
        assert script.find_diffusion_model(settings) == settings


# --- what it refuses -------------------------------------------------------------------------------------------------


def assert_refused(script: SimpleNamespace, flags: list[str], message: str, folder: Path) -> None:
    """In one line, before anything is written."""
    output = folder / "output"
    with pytest.raises(ValueError, match=message) as error:
        script.main([*TINY, *TINY_CLASSIFIER, *flags, "--output_dir", str(output)])
    assert "\n" not in str(error.value)
    assert not output.exists()


def test_noise_levels_other_than_the_diffusion_models_are_refused(
    script: SimpleNamespace, diffusion_model: Path, guided_pipeline: Path, tmp_path: Path
) -> None:
    model = ["--diffusion_model", str(diffusion_model)]
    assert_refused(script, [*model, "--beta_schedule", "linear"], r"beta_schedule.*squaredcos_cap_v2.*linear", tmp_path)
    assert_refused(script, [*model, "--num_train_timesteps", "61"], r"num_train_timesteps.*60.*61", tmp_path)
    same = parse_settings(script.ClassifierSettings, [*model, "--num_train_timesteps", "60"])
    assert len(script.choose_levels(same, open_diffusion_model(str(diffusion_model)))) == 60
    start = ["--init_classifier", str(guided_pipeline / "classifier"), "--beta_schedule", "linear"]
    with pytest.raises(ValueError, match=r"init_from.*noise levels.*'linear'.*'squaredcos_cap_v2'"):
        script.main([*TINY, *start, "--num_train_timesteps", "60", "--output_dir", str(tmp_path / "output")])


def test_models_for_other_images_or_classes_are_refused(
    script: SimpleNamespace, diffusion_model: Path, tmp_path: Path
) -> None:
    model = ["--diffusion_model", str(diffusion_model)]
    assert_refused(script, [*model, "--resolution", "16"], r"diffusion_model.*16.*8.*resolution", tmp_path)
    assert_refused(script, ["--diffusion_model", str(tmp_path)], r"diffusion_model.*folder or Hub id", tmp_path)
    assert_refused(script, [*model, "--judge", str(tmp_path)], r"judge.*folder or Hub id", tmp_path)
    NoisyClassifier(8, 1, 7, model_channels=32).save_pretrained(tmp_path / "seven")
    assert_refused(script, [*model, "--judge", str(tmp_path / "seven")], r"judge.*num_classes, 10, got 7", tmp_path)
    for folder, reason in (
        (tmp_path / "seven", r"'num_classes': 10.*'num_classes': 7"),
        (tmp_path, "folder or Hub id"),
    ):
        with pytest.raises(ValueError, match=rf"init_from.*{reason}"):
            script.main([*TINY, "--init_classifier", str(folder), "--output_dir", str(tmp_path / "output")])


def test_sizes_that_do_not_fit_are_refused(script: SimpleNamespace, diffusion_model: Path, tmp_path: Path) -> None:
    assert_refused(script, ["--resolution", "9"], r"sample_size.*multiple of 2.*9", tmp_path)
    assert_refused(script, ["--train_batch_size", "1501"], r"train_batch_size.*1500.*1501", tmp_path)


def test_settings_that_contradict_each_other_are_refused(script: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"init_from.*model_channels"):
        script.ClassifierSettings(init_from="folder", model_channels=8)
    with pytest.raises(ValueError, match=r"guided_denoising_weight.*diffusion_model"):
        script.ClassifierSettings(guided_denoising_weight=1.0)
    with pytest.raises(ValueError, match=r"classification_weight.*positive"):
        script.ClassifierSettings(classification_weight=0.0)
    conditional = save_diffusion_model(tmp_path / "conditional", num_class_embeds=10)
    guided = ["--diffusion_model", str(conditional), "--guided_denoising_weight", "1"]
    assert_refused(script, guided, r"guided_denoising_weight.*unconditional", tmp_path)


def test_score_networks_that_cannot_be_guided_so_are_refused(script: SimpleNamespace, tmp_path: Path) -> None:
    model = ["--diffusion_model", str(save_score_network(tmp_path / "ncsn"))]
    assert_refused(script, [*model, "--beta_schedule", "linear"], r"beta_schedule.*None.*linear", tmp_path)
    assert_refused(script, [*model, "--guided_denoising_weight", "1"], r"guided_denoising_weight.*variance", tmp_path)
    from_zero = ["--diffusion_model", str(save_score_network(tmp_path / "zero", rescaled=False))]
    assert_refused(script, from_zero, r"diffusion_model.*\[-1, 1\]", tmp_path)


def test_label_smoothing_spreads_its_share_over_all_classes(script: SimpleNamespace) -> None:
    labels = torch.tensor([2, 0])
    smooth = script.smooth_labels(labels, 4, 0.2)
    torch.testing.assert_close(smooth, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    assert torch.equal(script.smooth_labels(labels, 4, 0.0), labels)
