"""Checkpoints on disk: whole or absent, checked before they are believed, and of the same run."""

import errno
import json
import logging
from pathlib import Path

import pytest
import torch

from hfdiff.data.files import remove_leftovers
from hfdiff.training import checkpoints
from hfdiff.training.checkpoints import (
    Snapshot,
    check_same_run,
    choose_checkpoint,
    find_checkpoints,
    find_fault,
    placed,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)

RUN = {"seed": 0, "learning_rate": 1e-3, "output_dir": "a"}


def snapshot_of(value: float) -> Snapshot:
    weights = {"layer.weight": torch.full((3, 5), value), "layer.bias": torch.zeros(3)}
    average = {name: tensor / 2 for name, tensor in weights.items()}
    training = {"optimizer": {"state": {0: {"step": torch.tensor(4.0)}}}, "stateful": [{"losses": [0.1, value]}]}
    return Snapshot({"model": weights, "average": average}, training)


def write(folder: Path, *steps: int, limit: int | None = None) -> None:
    for step in steps:
        write_checkpoint(folder, step, snapshot_of(step), RUN, limit)


def names(folder: Path) -> list[str]:
    return [path.name for path in find_checkpoints(folder)]


def flip_bit(path: Path, position: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# --- what is written is read -----------------------------------------------------------------------------------------


def test_a_checkpoint_gives_back_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, 4)
    weights, training = read_checkpoint(tmp_path / "checkpoint-4")
    expected = snapshot_of(4)
    assert weights.keys() == {"model", "average"}
    for kind, tensors in expected.weights.items():
        assert weights[kind].keys() == tensors.keys()
        assert all(torch.equal(weights[kind][name], tensor) for name, tensor in tensors.items())
    assert training["stateful"] == expected.training["stateful"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_the_manifest_says_step_settings_sizes_and_standard_checksums(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path, 4)
    manifest = read_manifest(tmp_path / "checkpoint-4")
    assert (manifest["step"], manifest["settings"]) == (4, RUN)
    files = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-4").iterdir()}
    files.pop("manifest.json")
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "training.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    name: str, damage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 2, 4)
    damage(tmp_path / "checkpoint-4" / name)
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
    (message,) = caplog.messages
    assert str(tmp_path / "checkpoint-4") in message
    assert name in message


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    write(tmp_path, 4)
    folder = tmp_path / "checkpoint-4"
    good = (folder / "manifest.json").read_bytes()
    for position in range(len(good)):
        if good[position : position + 1].isspace():
            continue  # layout
        changed = bytearray(good)
        changed[position] ^= 1
        (folder / "manifest.json").write_bytes(changed)
        assert find_fault(folder, 4) is not None, good[position - 5 : position + 5]


def test_without_a_good_checkpoint_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    for step in (2, 4):
        truncate(tmp_path / f"checkpoint-{step}" / "training.pt")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*undamaged.*output_dir"):
        choose_checkpoint(tmp_path, "latest")
    write(tmp_path, 2)
    with pytest.raises(ValueError, match=r"undamaged.*checkpoint-4"):  # named, so not replaced by another
        choose_checkpoint(tmp_path, "checkpoint-4")


def test_a_renamed_checkpoint_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-9")
    assert find_fault(tmp_path / "checkpoint-9", 9) == "manifest.json is of step 2"


# --- which one -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_found_by_step_and_never_ignored(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path, None) is None
    assert choose_checkpoint(tmp_path, "latest") is None
    write(tmp_path, 10, 9)
    (tmp_path / "checkpoint-11.partial").mkdir()
    assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert choose_checkpoint(tmp_path, "checkpoint-9").name == "checkpoint-9"
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*checkpoint-7"):
        choose_checkpoint(tmp_path, "checkpoint-7")
    with pytest.raises(ValueError, match=r"output_dir.*resume_from_checkpoint latest"):
        choose_checkpoint(tmp_path, None)


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path, 2)
    checkpoint, free = tmp_path / "checkpoint-2", frozenset({"output_dir"})
    check_same_run(checkpoint, {**RUN, "output_dir": "b"}, free)
    for name, value in (("seed", 1), ("learning_rate", 2e-3), ("dropout", 0.5)):
        with pytest.raises(ValueError, match=rf"of another: `{name}` was {RUN.get(name)}, is {value};"):
            check_same_run(checkpoint, {**RUN, name: value}, free)
    check_same_run(checkpoint, {**RUN, "dropout": 0.0}, free, defaults={"seed": 5, "dropout": 0.0})  # unknown then
    with pytest.raises(ValueError, match=r"`dropout` was 0.0, is 0.5;"):
        check_same_run(checkpoint, {**RUN, "dropout": 0.5}, free, defaults={"dropout": 0.0})


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6, 8, limit=2)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8"]
    write(tmp_path, 10, limit=1)
    assert names(tmp_path) == ["checkpoint-10"]


def test_old_checkpoints_stay_until_the_new_one_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 2)
    written = checkpoints.write_synced
    monkeypatch.setattr(checkpoints, "write_synced", lambda path, content: written(path, content[:-1]))
    with pytest.raises(OSError, match=r"Could not write .*checkpoint-4.*checkpoint-2 is intact"):
        write(tmp_path, 4, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert find_fault(tmp_path / "checkpoint-2", 2) is None


def test_a_good_checkpoint_is_not_deleted_for_a_damaged_later_one(tmp_path: Path) -> None:
    write(tmp_path, 2, 6)
    truncate(tmp_path / "checkpoint-6" / "training.pt")
    write(tmp_path, 4, limit=1)
    assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-4"
    write(tmp_path, 6, limit=1)  # the run comes to the damaged one's place
    assert names(tmp_path) == ["checkpoint-6"]
    assert find_fault(tmp_path / "checkpoint-6", 6) is None


# --- a full disk, a broken run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", range(4))
def test_a_full_disk_leaves_the_last_checkpoint_and_no_part_of_the_next(
    file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)
    written, left = checkpoints.write_synced, iter(range(file))

    def fill(path: Path, content: bytes) -> None:
        if next(left, None) is None:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, content)

    monkeypatch.setattr(checkpoints, "write_synced", fill)
    with pytest.raises(OSError, match=r"checkpoint-4: .*No space left on device; checkpoint-2 is intact.*room"):
        write(tmp_path, 4, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-2"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_written(value: float, tmp_path: Path) -> None:
    write(tmp_path, 2)
    with pytest.raises(FloatingPointError, match=r"layer.weight.*step 4; checkpoint-2 is intact"):
        write_checkpoint(tmp_path, 4, snapshot_of(value), RUN)
    assert names(tmp_path) == ["checkpoint-2"]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "checkpoint-4.partial").mkdir()
    (tmp_path / "log.jsonl.partial").touch()
    (tmp_path / "log.jsonl").touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "log.jsonl"]


# --- the model's folder ----------------------------------------------------------------------------------------------


def make_model(folder: Path, text: str) -> None:
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet" / "weights").write_text(text)
    (folder / "model_index.json").write_text(json.dumps(text))


def test_a_model_replaces_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    make_model(tmp_path, "old")
    (tmp_path / "unet" / "stale").touch()
    write(tmp_path, 2)
    with placed(tmp_path) as folder:
        make_model(folder, "new")
        assert (tmp_path / "unet" / "weights").read_text() == "old"
    assert (tmp_path / "unet" / "weights").read_text() == "new"
    assert not (tmp_path / "unet" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "model_index.json", "unet"]


def test_a_full_disk_leaves_the_model_before(tmp_path: Path) -> None:
    make_model(tmp_path, "old")

    def save() -> None:
        with placed(tmp_path) as folder:
            make_model(folder, "new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"Could not write the model.*No space left.*no checkpoint yet"):
        save()
    assert (tmp_path / "unet" / "weights").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "unet"]
