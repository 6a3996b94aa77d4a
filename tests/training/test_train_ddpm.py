"""Training a diffusion model: what is drawn and measured on the way, and the script from end to end."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image
from torch import Tensor
from trainings import load_training

from hfdiff.data.labelled import LabelledImages
from hfdiff.evaluation import frechet_distance
from hfdiff.models.noisy_classifier import NoisyClassifier
from hfdiff.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from hfdiff.schedulers.noise import BETA_SCHEDULES
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.losses import ddpm_losses
from hfdiff.training.monitor import clean_statistics, real_statistics, validation_loss
from hfdiff.training.samples import draw_images, save_grid
from hfdiff.training.settings import BetaSchedule
from hfdiff.training.train_ddpm import make_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return load_training("ddpm")


# --- on the way ------------------------------------------------------------------------------------------------------


class KnownImages(UNet2DModel):
    """A model of prediction type "sample" that knows each class's image, all of one grey level."""

    levels = (-1.0, 0.0, 1.0)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        levels = torch.tensor(self.levels)[class_labels]
        return SimpleNamespace(sample=levels.view(-1, 1, 1, 1).expand_as(sample))


def test_classes_are_drawn_in_turn_and_the_chain_stays() -> None:
    scheduler = DDPMScheduler(num_train_timesteps=10, prediction_type="sample")
    unet = KnownImages(
        sample_size=2, in_channels=1, out_channels=1, num_class_embeds=3, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1, attention_head_dim=8,
    )  # fmt: skip
    data = LabelledImages(torch.zeros(3, 1, 2, 2), None, ["black", "grey", "white"])
    pipe = make_pipeline(unet, scheduler, data)
    images = draw_images(pipe, 5, num_inference_steps=50, seed=0)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 1, 2, 2)
    assert images[:, 0, 0, 0].tolist() == [0, 128, 255, 0, 128]
    draw_images(pipe, 1, num_inference_steps=3, seed=0)
    assert len(scheduler.timesteps) == 10


def test_a_grid_shows_every_image(tmp_path: Path) -> None:
    save_grid(torch.full((9, 3, 8, 8), 255, dtype=torch.uint8), tmp_path / "samples" / "grid.png")
    grid = Image.open(tmp_path / "samples" / "grid.png")
    assert grid.mode == "RGB"
    assert grid.size == (8 * (3 * 10 - 2),) * 2  # three images of 8 pixels and two gaps of 2, enlarged by 8


def test_held_out_images_meet_timesteps_spread_over_the_chain_with_the_same_noise() -> None:
    data = LabelledImages(torch.zeros(300, 1, 2, 2), torch.arange(300), [])
    seen = []

    def losses(unet: object, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        seen.append((t, noise, labels))
        return t.float()

    first, second = (validation_loss(KnownImages(), losses, 1000, data, seed) for seed in (3, 3))
    assert first == second == pytest.approx(999 / 2)
    timesteps, noise, labels = (torch.cat(parts) for parts in zip(*seen[:2]))
    assert torch.equal(labels, torch.arange(300))
    assert (timesteps.sort().values.diff() - 999 / 299).abs().max() <= 1
    assert not torch.equal(timesteps, timesteps.sort().values)
    assert torch.equal(noise, torch.cat([parts[1] for parts in seen[2:]]))


class Pixels:
    """A classifier whose features of clean images are their pixels."""

    device = CPU

    def features(self, sample: Tensor, timestep: int) -> Tensor:
        assert timestep == 0
        return sample.flatten(1)


def test_statistics_of_features_are_kept_for_the_same_data_alone(tmp_path: Path) -> None:
    data = LabelledImages(torch.rand(500, 1, 2, 2) * 2 - 1, None, [])
    mean, covariance, _ = real_statistics(Pixels(), data, "pixels of noise", tmp_path)
    pixels = data.images.flatten(1).double().numpy()
    np.testing.assert_allclose(mean, pixels.mean(0))
    np.testing.assert_allclose(covariance, np.cov(pixels.T))
    same = clean_statistics(Pixels(), data.images)
    assert frechet_distance(same.mean, same.covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    moved = clean_statistics(Pixels(), data.images + 1)
    # ‖(1, 1, 1, 1)‖²
    assert frechet_distance(moved.mean, moved.covariance, mean, covariance) == pytest.approx(4, rel=1e-6)
    for kept, expected in zip(real_statistics(None, data, "pixels of noise", tmp_path), (mean, covariance)):
        assert torch.equal(kept, expected)
    other = LabelledImages(data.images + 1, None, [])
    torch.testing.assert_close(real_statistics(Pixels(), other, "pixels of others", tmp_path)[0], mean + 1)


# --- the script ------------------------------------------------------------------------------------------------------

TINY = [
    *("--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--attention_head_dim", "8", "--report_to", "none"),
    *("--train_batch_size", "16", "--max_train_steps", "4", "--lr_warmup_steps", "1", "--checkpointing_steps", "3"),
    *("--logging_steps", "1", "--sample_images", "4", "--sample_steps", "2", "--num_train_timesteps", "4"),
]
# Each of 4 timesteps is drawn 10 times within three steps, so the fourth step's are drawn by their losses.
FULL = [
    *("--loss_type", "hybrid", "--variance_type", "learned_range", "--time_sampling", "loss-second-moment"),
    *("--class_conditional", "--dropout", "0.2", "--validation_steps", "2", "--fid_images", "8"),
    *("--bits_per_dim_images", "5", "--beta_schedule", "linear", "--beta_start", "0.1", "--beta_end", "0.5"),
]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("features")
    NoisyClassifier(
        8, 1, 10, model_channels=8, channel_mult=(1, 2), attention_downsamples=(), num_head_channels=8,
        norm_num_groups=4,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def full_run(script: SimpleNamespace, features: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    script.main([*TINY, *FULL, "--fid_features", features, "--output_dir", str(folder)])
    return folder


def test_a_run_leaves_a_pipeline_its_numbers_and_pictures(full_run: Path) -> None:
    pipe = ClassifierGuidedPipeline.from_pretrained(full_run)
    assert pipe.unet.config.out_channels == 2
    assert pipe.unet.config.num_class_embeds == 10
    assert pipe.unet.config.dropout == 0.2
    assert pipe.scheduler.config.variance_type == "learned_range"
    torch.testing.assert_close(pipe.scheduler.betas, torch.linspace(0.1, 0.5, 4, dtype=torch.float64))
    lines = [json.loads(line) for line in (full_run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        copies = {"copies", "copies_held_out"}
        assert line.keys() == {"step", "validation_loss", "bits_per_dim", "frechet_distance", "drift_grey"} | copies
        assert all(np.isfinite(value) for value in line.values())
    assert {path.name for path in (full_run / "samples").iterdir()} == {"step-2.png", "step-4.png"}
    assert (full_run / "samples.png").read_bytes() == (full_run / "samples" / "step-4.png").read_bytes()
    assert Image.open(full_run / "samples.png").size == (8 * 18, 8 * 18)  # two by two
    card = (full_run / "README.md").read_text()
    assert f"{lines[-1]['bits_per_dim']:.4g}" in card
    assert "image = pipe(['0'], num_inference_steps=" in card
    assert "loss_type: hybrid" in card


def test_a_resumed_run_draws_the_same_timesteps(
    script: SimpleNamespace, full_run: Path, features: str, tmp_path: Path
) -> None:
    shutil.copytree(full_run / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(full_run / "log.jsonl", tmp_path)
    flags = ["--fid_features", features, "--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path)]
    script.main([*TINY, *FULL, *flags])
    for name in ("unet/diffusion_pytorch_model.safetensors", "log.jsonl"):
        assert (tmp_path / name).read_bytes() == (full_run / name).read_bytes(), name
    last = (tmp_path / "validation.jsonl").read_text().splitlines()[-1]
    assert last == (full_run / "validation.jsonl").read_text().splitlines()[-1]
    timesteps = torch.load(tmp_path / "checkpoint-4" / "training.pt", weights_only=True)["stateful"][-1]["counts"]
    assert timesteps.sum() == 4 * 16
    assert timesteps.min() >= 10


def test_labels_shape_the_batches_of_a_model_that_is_told_none(script: SimpleNamespace, tmp_path: Path) -> None:
    flags = [*TINY, "--balance_classes", "--bits_per_dim_images", "0", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"random_flip_classes.*0, 1, 2.*got 'eleven'"):
        script.main([*flags, "--random_flip_classes", "8,eleven"])
    assert not (tmp_path / "run").exists()
    script.main([*flags, "--random_flip_classes", "[0,8]", "--max_train_steps", "1"])
    assert DDPMPipeline.from_pretrained(tmp_path / "run").unet.config.num_class_embeds is None


def test_the_settings_know_every_schedule() -> None:
    assert set(get_args(BetaSchedule)) == set(BETA_SCHEDULES)


@pytest.mark.parametrize("schedule", sorted(BETA_SCHEDULES))
def test_every_schedule_trains_and_samples(script: SimpleNamespace, schedule: str) -> None:
    settings = script.DDPMSettings(
        beta_schedule=schedule, num_train_timesteps=50, prediction_type="v_prediction", variance_type="learned_range",
        loss_type="vlb", block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    scheduler = script.make_scheduler(settings)
    unet = script.make_unet(settings, LabelledImages(torch.zeros(1, 1, 8, 8), None, []))
    drawn = (torch.rand(50, 1, 8, 8) * 2 - 1, torch.arange(50), torch.randn(50, 1, 8, 8))
    for loss_type in ("simple", "vlb", "hybrid"):
        assert ddpm_losses(unet, scheduler, *drawn, loss_type=loss_type).isfinite().all()
    pipe = make_pipeline(unet, scheduler, LabelledImages(None, None, []))
    assert draw_images(pipe, 2, num_inference_steps=5, seed=0).float().std() > 0


def test_a_learned_variance_samples_in_diffusers_pipeline(script: SimpleNamespace, tmp_path: Path) -> None:
    flags = ["--loss_type", "vlb", "--variance_type", "learned", "--prediction_type", "v_prediction"]
    script.main([*TINY, *flags, "--output_dir", str(tmp_path)])
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.num_class_embeds is None
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--variance_type learned_range", "loss_type.*simple.*learned_range"),
        ("--loss_type hybrid", "loss_type.*hybrid.*variance_type"),
        ("--loss_type vlb --snr_gamma 5", "snr_gamma"),
        ("--loss_type l1", "loss_type"),
        ("--snr_gamma 0", "snr_gamma"),
        ("--beta_schedule wavy", "beta_schedule.*wavy"),
        ("--beta_end 1.5 --beta_schedule linear", "beta_end.*1.00"),
        ("--beta_schedule jsd", "prediction_type.*jsd"),
        ("--attention_head_dim 7", "attention_head_dim.*7"),
        ("--attention [2]", "attention"),
        ("--norm_num_groups 8", "norm_num_groups"),
        ("--time_sampling often", "time_sampling"),
        ("--dropout 2", "dropout"),
    ],
)
def test_settings_that_cannot_train_end_the_script_before_anything_is_written(
    script: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        script.main([*TINY, *flags.split(), "--output_dir", str(tmp_path / "run")])
    lines = [*capsys.readouterr().err.strip().splitlines(), str(error.value)]
    assert re.search(message, " ".join(lines)), lines
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_the_images_is_refused(script: SimpleNamespace, features: str, tmp_path: Path) -> None:
    output = ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"resolution.*multiple of 2.*got 9"):
        script.main([*TINY, *output, "--resolution", "9"])
    with pytest.raises(ValueError, match=r"fid_features.*sample_size.*16.*8"):
        script.main([*TINY, *output, "--resolution", "16", "--fid_features", features])
    with pytest.raises(ValueError, match=r"fid_features.*nowhere"):
        script.main([*TINY, *output, "--fid_features", str(tmp_path / "nowhere")])
    assert not (tmp_path / "run").exists()
