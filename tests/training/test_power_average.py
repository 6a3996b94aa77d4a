"""Averages whose length is chosen afterwards: their width, what they weigh, and what is made from those of a run."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from torch import nn
from trainings import load_training

from hfdiff import cli
from hfdiff.training.power_average import (
    KEPT,
    PowerAverage,
    combine,
    drop_averages,
    exponent,
    find_averages,
    is_written,
    reconstruct,
    write_averages,
)

TOTAL, COUNT = 2000, 16


def power_weights(sigma_rel: float, steps: int) -> torch.Tensor:
    """What a power average makes of each step: of weights that are 1 after that step and 0 after others."""
    parameter = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    average = PowerAverage([parameter], sigma_rel, foreach=False)
    for step in range(steps):
        with torch.no_grad():
            parameter.copy_(nn.functional.one_hot(torch.tensor(step), steps))
        average.step([parameter])
    return average.shadow_params[0]


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.10, 0.25])
def test_the_profile_is_as_wide_as_its_name_says(sigma_rel: float) -> None:
    weights = power_weights(sigma_rel, 500)
    assert weights.sum().item() == pytest.approx(1)
    time = (torch.arange(500) + 0.5) / 500
    mean = (weights * time).sum()
    assert (weights * (time - mean).square()).sum().sqrt().item() == pytest.approx(sigma_rel, rel=0.01)
    assert (weights[1:] > weights[:-1]).all()


def test_exponents_are_those_of_the_paper_and_belong_to_lengths_in_range() -> None:
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)  # both as in the paper, section 3.1
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    for wrong in (0.0, 0.3, float("nan")):
        with pytest.raises(ValueError, match=r"`sigma_rel` must be from 0\.01 to 0\.28"):
            exponent(wrong)


@pytest.fixture(scope="module")
def trajectory() -> torch.Tensor:
    """Weights (steps, 6): a ramp, a root, a wave, a step, a constant and a random walk."""
    t = torch.arange(1, TOTAL + 1, dtype=torch.float64) / TOTAL
    walk = torch.randn(TOTAL, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0) / TOTAL**0.5
    return torch.stack([t, t.sqrt(), (9 * t).sin(), (t > 0.77).double(), torch.full_like(t, 3.0), walk], dim=1)


def follow(trajectory: torch.Tensor, sigma_rel: float) -> list[torch.Tensor]:
    """The average after each step, tracked directly."""
    parameter = nn.Parameter(torch.zeros_like(trajectory[0]))
    average, seen = PowerAverage([parameter], sigma_rel, foreach=True), []
    for weights in trajectory:
        with torch.no_grad():
            parameter.copy_(weights)
        average.step([parameter])
        seen.append(average.shadow_params[0].clone())
    return seen


@pytest.fixture(scope="module")
def run_folder(trajectory: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    kept = {sigma_rel: follow(trajectory, sigma_rel) for sigma_rel in KEPT}
    for step in range(1, TOTAL + 1):
        if is_written(step, TOTAL, COUNT):
            write_averages(folder, step, {sigma_rel: {"w": seen[step - 1]} for sigma_rel, seen in kept.items()})
    return folder


@pytest.mark.parametrize(
    ("sigma_rel", "error"), [(0.05, 1e-6), (0.10, 1e-6), (0.08, 0.003), (0.03, 0.04), (0.2, 0.025)]
)
def test_another_length_is_nearly_the_average_tracked_directly(
    trajectory: torch.Tensor, run_folder: Path, sigma_rel: float, error: float
) -> None:
    """The error is a share of the weights' range, as that of the profile is of the profile."""
    written = find_averages(run_folder)
    assert len(written) == 2 * COUNT
    coefficients, miss = combine(written, sigma_rel)
    assert miss <= error
    assert coefficients.sum() == pytest.approx(1)
    ((name, made),) = reconstruct(written, coefficients)
    assert name == "w"
    direct = follow(trajectory, sigma_rel)[-1]
    scale = trajectory.max(0).values - trajectory.min(0).values
    assert ((made - direct).abs() <= error * scale + 1e-6).all()
    assert made[4].item() == pytest.approx(3, rel=1e-6)  # what does not move comes out as it is


def test_more_snapshots_make_it_better(run_folder: Path) -> None:
    written = find_averages(run_folder)
    errors = [combine(written[-count:], 0.15)[1] for count in (2, 8, 16, 32)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_snapshots_are_spread_evenly_and_end_with_the_run() -> None:
    for total, count in ((2000, 16), (10, 3), (5, 8), (7, 7)):
        steps = [step for step in range(1, total + 1) if is_written(step, total, count)]
        assert len(steps) == min(total, count)
        assert steps[-1] == total
        assert np.ptp(np.diff([0, *steps])) <= 1
    assert not any(is_written(step, 10, 0) for step in range(1, 11))


FLAGS = [
    *("--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--attention_head_dim", "8", "--report_to", "none"),
    *("--average_snapshots", "4", "--max_train_steps", "8", "--checkpointing_steps", "3", "--train_batch_size", "4"),
    *("--lr_warmup_steps", "1", "--bits_per_dim_images", "0", "--sample_images", "1", "--sample_steps", "1"),
]


@pytest.mark.parametrize("augmented", [False, True])
def test_a_run_resumes_to_the_same_averages_and_another_is_made_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], augmented: bool
) -> None:
    script, run, resumed, made = load_training("ddpm"), tmp_path / "run", tmp_path / "resumed", tmp_path / "made"
    flags = [*FLAGS, "--augment_probability", "0.3"] if augmented else FLAGS
    script.main([*flags, "--output_dir", str(run)])
    files = [f"averages/step-{step}.safetensors" for step in (2, 4, 6, 8)]
    assert sorted(path.name for path in (run / "averages").iterdir()) == [Path(file).name for file in files]
    shutil.copytree(run / "averages", resumed / "averages")
    (resumed / "averages" / "step-5.safetensors").write_bytes(b"of a run before")
    shutil.copytree(run / "checkpoint-3", resumed / "checkpoint-3")
    script.main([*flags, "--resume_from_checkpoint", "latest", "--output_dir", str(resumed)])
    assert not (resumed / "averages" / "step-5.safetensors").exists()
    for file in files:
        assert (run / file).read_bytes() == (resumed / file).read_bytes(), file

    assert cli.main(["average", str(run), "--sigma_rel", "0.1", "--output", str(made)]) == 0
    assert "from 8 averages" in capsys.readouterr().out
    assert {path.name for path in made.iterdir()} == {"model_index.json", "scheduler", "unet"}
    weights = load_file(made / "unet" / "diffusion_pytorch_model.safetensors")
    kept = load_file(run / "checkpoint-8" / "average-0.10.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, kept[f"unet.{name}" if augmented else name], atol=1e-5, rtol=1e-5)
    pipe = DDPMPipeline.from_pretrained(made)
    assert torch.equal(pipe.unet.conv_in.weight, weights["conv_in.weight"])
    assert cli.main(["average", str(run), "--sigma_rel", "0.01", "--output", str(tmp_path / "short")]) == 2
    assert "--sigma_rel" in (message := capsys.readouterr().err)
    assert "miss by" in message
    assert cli.main(["average", str(run), "--sigma_rel", "0.1", "--output", str(made)]) == 2
    assert "`--output` must be a new" in capsys.readouterr().err


def test_a_run_without_averages_is_refused_and_a_new_one_begins_without_old_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`run_folder` must be the folder of a training with `--average_snapshots`"):
        find_averages(tmp_path)
    for step in (3, 6):
        write_averages(tmp_path, step, {0.05: {"w": torch.zeros(1)}})
    drop_averages(tmp_path, 5)
    assert [path.name for path in (tmp_path / "averages").iterdir()] == ["step-3.safetensors"]
