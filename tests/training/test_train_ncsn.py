"""The script that trains score networks, its noise levels and its loss."""

import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trainings import load_training

from hfdiff import AnnealedLangevinScheduler, NCSNPipeline
from hfdiff.data.labelled import LabelledImages
from hfdiff.schedulers.gaussian import from_x0
from hfdiff.training import levels
from hfdiff.training.levels import choose_levels, largest_distance
from hfdiff.training.losses import score_matching_losses


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return load_training("ncsn")


# --- the loss --------------------------------------------------------------------------------------------------------

SCALE = 0.5  # of the data, N(0, SCALE²)


def exact_model(scheduler: AnnealedLangevinScheduler):
    """The exact prediction of a scheduler's type for data N(0, SCALE²), from the model's input as it is given."""
    kind, scaled = scheduler.config.prediction_type, scheduler.config.scale_input

    def model(sample: Tensor, t: Tensor) -> SimpleNamespace:
        sigma = scheduler.sigmas[t].view(-1, 1, 1, 1)
        alpha_bar = 1 / (1 + sigma**2)
        xt = sample / alpha_bar**0.5 if scaled else sample
        if kind == "score":
            return SimpleNamespace(sample=-xt / (SCALE**2 + sigma**2))
        x0 = SCALE**2 / (SCALE**2 + sigma**2) * xt
        return SimpleNamespace(sample=from_x0(x0, alpha_bar**0.5 * xt, alpha_bar, kind))

    return model


@pytest.mark.parametrize(
    ("kind", "scaled"), [("score", False), ("epsilon", True), ("sample", True), ("v_prediction", True)]
)
def test_the_loss_of_the_exact_score_is_what_no_score_can_know(kind: str, scaled: bool) -> None:
    """σ s + ε has the variance s²/(s² + σ²) per element for data N(0, s²)."""
    scheduler = AnnealedLangevinScheduler(3, 0.1, 5.0, prediction_type=kind, scale_input=scaled)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3000, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    timestep = torch.arange(3000) % 3
    losses = score_matching_losses(exact_model(scheduler), scheduler, SCALE * x0, timestep, noise)
    for t in range(3):
        expected = 0.5 * 16 * SCALE**2 / (SCALE**2 + float(scheduler.sigmas[t]) ** 2)
        standard_error = expected * (2 / (16 * 1000)) ** 0.5
        assert losses[timestep == t].mean() == pytest.approx(expected, abs=4 * standard_error)


def test_the_loss_of_no_score_is_the_noises_energy() -> None:
    scheduler = AnnealedLangevinScheduler(4, 0.1, 5.0)
    noise = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    losses = score_matching_losses(
        lambda xt, t: SimpleNamespace(sample=torch.zeros_like(xt)), scheduler, noise, torch.arange(5) % 4, noise
    )
    torch.testing.assert_close(losses, 0.5 * noise.square().sum(dim=(1, 2, 3)))


# --- the levels ------------------------------------------------------------------------------------------------------


def test_the_largest_distance_is_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "BLOCK", 3)
    images = torch.zeros(8, 1, 2, 2)
    images[1, 0, 0] = torch.tensor([-3.0, 0.0])
    images[7, 0, 1] = torch.tensor([0.0, 4.0])
    assert largest_distance(images) == pytest.approx(5)


def test_levels_are_chosen_by_the_papers_rules_and_given_ones_kept() -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 25.0, -25.0
    data = LabelledImages(images, None, [])
    chosen = choose_levels(data, 0.01, "auto", "auto")
    assert chosen.sigma_max == pytest.approx(50)
    reach = (2 * 3 * 32 * 32) ** 0.5  # half of the level below is within three of its σ where reach (γ - 1) = 3 γ
    assert chosen.num_levels == 1 + math.ceil(math.log(5000) / math.log(reach / (reach - 3)))  # 220; the paper has 232
    assert re.search("sigma_max = 50: the largest distance between two of 2 images", chosen.reasons[0])
    assert "technique 2" in chosen.reasons[1]
    given = choose_levels(data, 0.01, 3.0, 7)
    assert given[:2] == (3.0, 7)
    assert given.reasons == ["sigma_max = 3: as given", "num_levels = 7: as given"]
    with pytest.raises(ValueError, match="sigma_max"):
        choose_levels(LabelledImages(torch.zeros(3, 1, 2, 2), None, []), 0.01, "auto", 5)


# --- the script ------------------------------------------------------------------------------------------------------

TINY = [
    *("--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--attention_head_dim", "8", "--report_to", "none"),
    *("--train_batch_size", "16", "--max_train_steps", "4", "--lr_warmup_steps", "1", "--checkpointing_steps", "3"),
    *("--logging_steps", "1", "--sample_images", "4", "--sample_steps", "9", "--num_levels", "4"),
]


@pytest.mark.parametrize("architecture", ["unet", "ncsn", "ncsnv2"])
def test_a_run_prints_its_levels_and_leaves_a_pipeline(
    script: SimpleNamespace, architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--architecture", architecture, "--model_channels", "8", "--sigma_min", "0.1", "--sampling", "consistent"]
    script.main([*TINY, *flags, "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"sigma_max = 9\.601: the largest distance between two of 1,500 images", printed)
    for words in ("num_levels = 4: as given", "step_size = .* sigma_min²: solved", "ema_decay = 0.999"):
        assert re.search(words, printed)
    pipe = NCSNPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert (len(pipe.scheduler), pipe.scheduler.config.sampling) == (4, "consistent")
    assert pipe.scheduler.config.scale_input == (architecture == "unet")
    assert pipe.scheduler.config.sigma_max == pytest.approx(9.601, abs=1e-3)
    images = pipe(2, 9, torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    card = (tmp_path / "README.md").read_text()
    assert "score matching loss of held-out images" in card
    assert "NCSNPipeline.from_pretrained" in card
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "samples" / "step-4.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sigma_max 0.01", "sigma_min.*sigma_max"),
        ("--num_levels 1", "num_levels.*at least 2"),
        ("--sample_steps 3", "num_inference_steps.*at least 5.*got 3"),
        ("--resolution 9", "resolution.*multiple of 2"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    script: SimpleNamespace, tmp_path: Path, flags: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        script.main([*TINY, *flags.split(), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(script: SimpleNamespace, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [*TINY, "--sigma_min", "0.1", "--gradient_accumulation_steps", "2", "--dropout", "0.1"]
    script.main([*flags, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    script.main([*flags, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
    for name in ("model", "average"):
        file = f"checkpoint-4/{name}.safetensors"
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    last = [(folder / "log.jsonl").read_text().splitlines()[-1] for folder in (whole, resumed)]
    assert last[0] == last[1]
