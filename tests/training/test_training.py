"""The training side: batches, settings, exact resume, and each script's main."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file
from trainings import load_training

from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.config import TrainingSettings, parse_settings

TRAINING = Path(__file__).parents[2] / "training"


# --- settings --------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 8e-4\nseed: 5\nuse_ema: false\n")
    settings = parse_settings(TrainingSettings, ["--learning_rate", "1e-3", f"--config={recipe}", "--use_ema"])
    assert (settings.learning_rate, settings.seed, settings.use_ema) == (1e-3, 5, True)
    assert settings.train_batch_size == TrainingSettings().train_batch_size
    assert not parse_settings(TrainingSettings, ["--no_use_ema"]).use_ema


@pytest.mark.parametrize(
    "flags", [["--learning_rat", "1"], ["--train_batch_size", "0"], ["--dataset_name", "a", "--train_data_dir", "b"]]
)
def test_mistaken_flags_end_the_script(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_settings(TrainingSettings, flags)


def test_numbers_are_plain_as_checkpoints_need_them() -> None:
    settings = parse_settings(TrainingSettings, ["--learning_rate", "0.5", "--seed", "3", "--use_ema", "false"])
    assert [type(value) for value in (settings.learning_rate, settings.seed, settings.use_ema)] == [float, int, bool]


def test_an_unknown_key_of_a_recipe_ends_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rates: 1.0\n")
    with pytest.raises(SystemExit, match="2"):
        parse_settings(TrainingSettings, ["--config", str(recipe)])
    assert "learning_rates" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(path.name for path in TRAINING.glob("recipes/*.yaml")))
def test_a_dry_run_of_each_recipe_prints_a_recipe_of_the_same_run(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = "classifier" in recipe
    if guided or "judge" in recipe:
        name, settings = "train_classifier", "ClassifierSettings"
    elif "ncsn" in recipe:
        name, settings = "train_ncsn", "NCSNSettings"
    else:
        name, settings = "train_ddpm", "DDPMSettings"
    script = load_training(name.removeprefix("train_"))
    guide = ["--diffusion_model", "folder"] if guided else []
    flags = ["--config", str(TRAINING / "recipes" / recipe), *guide]
    with pytest.raises(SystemExit, match="0"):
        script.main([*flags, "--dry_run"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = parse_settings(getattr(script, settings), ["--config", str(printed)])
    assert again == parse_settings(getattr(script, settings), flags)


# --- the loop --------------------------------------------------------------------------------------------------------


TINY = [
    *("--train_batch_size", "8", "--max_train_steps", "4", "--lr_warmup_steps", "1", "--learning_rate", "1e-3"),
    *("--checkpointing_steps", "2", "--logging_steps", "1"),
]
TINY_UNET = ["--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--attention_head_dim", "8"]


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion")
    load_training("ddpm").main([*TINY, *TINY_UNET, "--output_dir", str(folder)])
    return folder


def resume_halfway(run: Path, folder: Path) -> list[str]:
    """A run's folder as it was after two of its four steps, and what had been written since; flags to resume it."""
    shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    (folder / "checkpoint-4.partial").mkdir()
    shutil.copy(run / "log.jsonl", folder)
    return ["--resume_from_checkpoint", "latest", "--output_dir", str(folder)]


def assert_same_files(name: str, *folders: Path) -> None:
    first, second = ((folder / name).read_bytes() for folder in folders)
    assert first == second


def test_a_resumed_diffusion_run_ends_with_the_same_bits(diffusion_model: Path, tmp_path: Path) -> None:
    load_training("ddpm").main([*TINY, *TINY_UNET, *resume_halfway(diffusion_model, tmp_path)])
    assert_same_files("unet/diffusion_pytorch_model.safetensors", diffusion_model, tmp_path)
    assert_same_files("checkpoint-4/model.safetensors", diffusion_model, tmp_path)
    assert_same_files("log.jsonl", diffusion_model, tmp_path)


def test_the_diffusion_script_saves_a_moving_average_that_diffusers_samples(diffusion_model: Path) -> None:
    pipe = DDPMPipeline.from_pretrained(diffusion_model)
    assert type(pipe.scheduler) is DDPMScheduler
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipe.unet.config.down_block_types == ["DownBlock2D", "AttnDownBlock2D"]
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    last = UNet2DModel.from_config(pipe.unet.config)
    last.load_state_dict(load_file(diffusion_model / "checkpoint-4" / "model.safetensors"))
    assert not torch.equal(last.conv_in.weight, pipe.unet.conv_in.weight)
    steps = [json.loads(line) for line in (diffusion_model / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["lr"] for line in steps] == pytest.approx(
        [0.0, 1e-3, 0.75e-3, 0.25e-3]
    )  # a step up, then a half cosine
