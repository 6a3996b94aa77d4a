"""A guided pipeline from a folder of pictures, by one command: what it chooses, what it leaves, how it goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from trainings import load_training

from hfdiff import ClassifierGuidedPipeline, cli
from hfdiff.data.labelled import LabelledImages
from hfdiff.training import plan
from hfdiff.training.batches import hold_out
from hfdiff.training.plan import choose, choose_resolution
from hfdiff.training.settings import GuidedSettings

CPU = torch.device("cpu")
QUICK = ["--block_out_channels", "[8,16]", "--mixed_precision", "no", "--sample_steps", "2", "--time_budget", "10s"]
QUICK = [*QUICK, "--max_train_steps", "4", "--classifier_steps", "4", "--report_to", "none", "--train_batch_size", "4"]
PARTS = ("unet", "classifier")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in a folder per class: of several sizes and shapes, some grey, some transparent."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for kind in ("cat", "dog", "owl"):
        (folder / kind).mkdir()
        for index, mode in enumerate(("RGB", "RGBA", "L", "RGB", "RGBA", "RGB")):
            size = (16 + index, 20)
            pixels = random.integers(256, size=(*size, 4), dtype=np.uint8)
            Image.fromarray(pixels, "RGBA").convert(mode).save(folder / kind / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guided")
    load_training("guided").main([*QUICK, "--train_data_dir", str(pictures), "--output_dir", str(folder)])
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    files = {part: load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in PARTS}
    return {f"{part}.{name}": tensor for part, found in files.items() for name, tensor in found.items()}


def test_one_command_makes_a_guided_pipeline(trained: Path) -> None:
    pipe = ClassifierGuidedPipeline.from_pretrained(trained)
    assert pipe.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert pipe.default_guidance_scale == 10
    assert pipe("owl", num_inference_steps=2).images[0].size == (16, 16)
    assert {"samples.png", "README.md", "plan.json"} <= {path.name for path in trained.iterdir()}
    assert "time_budget: 10s" in (trained / "README.md").read_text()
    chosen = json.loads((trained / "plan.json").read_text())["chosen"]
    assert chosen == {
        "resolution": 16,
        "hold_out": 0.0,
        "balance_classes": False,
        "augment_probability": 0.12,
        "learning_rate": 0.002,
    }


def test_a_finished_run_is_left_as_it_is(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    load_training("guided").main([*QUICK, "--train_data_dir", str(pictures), "--output_dir", str(trained)])
    assert "trained already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stage", ["diffusion", "classifier"])
def test_a_run_that_was_stopped_ends_with_the_same_weights(trained: Path, pictures: Path, stage: str) -> None:
    """Stopped after three of four steps of a stage: what came later is not there."""
    expected = {name: tensor.clone() for name, tensor in weights(trained).items()}
    for part in ("model_index.json", "unet", "classifier", "scheduler", "checkpoint-4"):
        remove(trained / part)
    if stage == "diffusion":
        for part in ("model_index.json", "unet", "scheduler", "checkpoint-4"):
            remove(trained / "diffusion" / part)
        for checkpoint in trained.glob("checkpoint-*"):
            remove(checkpoint)
    load_training("guided").main([*QUICK, "--train_data_dir", str(pictures), "--output_dir", str(trained)])
    found = weights(trained)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def test_another_run_is_refused_in_a_runs_folder(trained: Path, pictures: Path) -> None:
    with pytest.raises(ValueError, match="`seed` was 0, is 1; give the same settings, or another folder"):
        load_training("guided").main(
            [*QUICK, "--train_data_dir", str(pictures), "--output_dir", str(trained), "--seed", "1"]
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--random_flip_classes", "cat,cow"], "`random_flip_classes` must be classes of the dataset, cat, dog, owl"),
        (["--label_column", "kind"], "`label_column` must be one of"),
        (["--hold_out", "0.9"], "`hold_out` must leave images on both sides"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_plan_is_kept(
    pictures: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_training("guided").main([*QUICK, "--train_data_dir", str(pictures), "--output_dir", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_settings_that_contradict_each_other_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="`hold_out` must be 0 with `validation_data`"):
        GuidedSettings(hold_out=0.1, validation_data="others")
    with pytest.raises(ValueError, match="leave one out"):
        GuidedSettings(random_flip=True, random_flip_classes="cat")


@pytest.mark.parametrize("budget", ["", "15", "5s", "1.5h", "soon"])
def test_a_budget_that_is_none_is_refused(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "guided", "--time_budget", budget])
    assert "`time_budget` must be a time of at least 10s, like 15m or 1h30m" in capsys.readouterr().err


def test_budgets_are_read() -> None:
    given = {"15m": 900, "90s": 90, "2h": 7200, "1h30m": 5400}
    assert {text: GuidedSettings(time_budget=text).seconds for text in given} == given


# --- what is chosen --------------------------------------------------------------------------------------------------


def choices_of(
    monkeypatch: pytest.MonkeyPatch,
    data: LabelledImages,
    parameters_a_second: float,
    processes: int = 1,
    **given: object,
) -> dict[str, object]:
    """What is chosen where a training step of an image takes a time in proportion to the network's parameters."""

    def speed(model: torch.nn.Module, *_: object) -> float:
        return parameters_a_second / sum(parameter.numel() for parameter in model.parameters())

    monkeypatch.setattr(plan, "_images_per_second", speed)
    settings = GuidedSettings(train_data_dir="pictures", mixed_precision="no", **given)  # type: ignore[arg-type]
    return {choice.name: choice.value for choice in choose(settings, data, CPU, processes)}


def colour_set(*sizes: int) -> LabelledImages:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return LabelledImages(torch.zeros(len(labels), 3, 16, 16), labels, [str(k) for k in range(len(sizes))])


def test_faster_machines_and_longer_times_take_wider_networks_up_to_the_images_they_must_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = colour_set(60, 60)
    slow, fast = (choices_of(monkeypatch, data, speed) for speed in (2e7, 4e8))
    longer = choices_of(monkeypatch, data, 2e7, time_budget="5h")
    assert slow["block_out_channels"] == (16, 32)
    assert fast["block_out_channels"] == longer["block_out_channels"]
    assert fast["block_out_channels"][0] > 16  # type: ignore[index]
    for chosen in (fast, longer):
        assert chosen["max_train_steps"] * chosen["train_batch_size"] >= plan.IMAGES * 0.99  # type: ignore[operator]


def test_processes_side_by_side_take_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    data, widths = colour_set(60, 60), {"block_out_channels": (8, 16), "train_batch_size": 8}
    one, two = (choices_of(monkeypatch, data, 1e7, processes, **widths) for processes in (1, 2))
    assert one["max_train_steps"] == two["max_train_steps"]
    assert one["classifier_steps"] == two["classifier_steps"]


def test_uneven_and_few_images_are_balanced_and_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = colour_set(20, 70), colour_set(3000, 3100)
    names = ("balance_classes", "augment_probability", "hold_out")
    chosen = [[choices_of(monkeypatch, data, 1e8)[name] for name in names] for data in (few, many)]
    assert chosen == [[True, 0.12, 0.0], [False, 0.0, 0.033]]  # 200 images


def test_what_is_given_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"hold_out": 0.2, "balance_classes": False, "augment_probability": 0.0, "train_batch_size": 8}
    given |= {"block_out_channels": (8, 8), "max_train_steps": 3, "classifier_steps": 3, "learning_rate": 1e-3}
    assert choices_of(monkeypatch, colour_set(20, 70), 1e8, **given) == {}


@pytest.mark.parametrize(
    ("side", "budget", "device", "size"),
    [
        (8, "15m", "cpu", 8),
        (28, "15m", "cpu", 28),
        (35, "15m", "cpu", 32),
        (200, "15m", "cpu", 32),
        (200, "3h", "cpu", 64),
        (200, "15m", "cuda", 64),
        (500, "5h", "cuda", 128),
        (90, "5h", "cuda", 88),
    ],
)
def test_the_resolution_follows_the_pictures_the_time_and_the_device(
    side: int, budget: str, device: str, size: int
) -> None:
    assert choose_resolution(GuidedSettings(time_budget=budget), side, torch.device(device)).value == size


# --- images held out -------------------------------------------------------------------------------------------------


def test_images_held_out_are_not_trained_on_and_of_every_class() -> None:
    labels = torch.arange(4).repeat_interleave(25)
    data = LabelledImages(torch.arange(100.0).view(-1, 1, 1, 1), labels, list("abcd"))
    kept, held = hold_out(data, 0.1, seed=0)
    numbers = torch.cat([kept.images, held.images]).flatten()
    assert len(held.images) == 10
    assert sorted(numbers.tolist()) == list(range(100))
    assert torch.equal(labels[held.images.flatten().long()], held.labels)
    assert held.labels is not None
    assert held.labels.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(hold_out(data, 0.1, seed=0)[1].images, held.images)
    assert not torch.equal(hold_out(data, 0.1, seed=1)[1].images, held.images)


@pytest.mark.parametrize("share", [0.9, 0.05])
def test_a_share_that_leaves_a_side_without_images_is_refused(share: float) -> None:
    data = LabelledImages(torch.zeros(20, 1, 1, 1), None, [])
    with pytest.raises(ValueError, match="`hold_out` must leave images on both sides"):
        hold_out(data, share, seed=0)
