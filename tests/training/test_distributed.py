"""Several processes on CPUs: the curve of one, the same bits after a stop, and one voice."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import ENDLESS, assert_one_line, assert_same_end, finish, kill, lines, start, steps, wait_for

from hfdiff.training.batches import Batch
from hfdiff.training.loop import own_rows


def test_the_processes_share_a_batch_row_by_row() -> None:
    batch = Batch(torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6), torch.arange(6.0), None)
    parts = [
        own_rows(batch, SimpleNamespace(num_processes=3, process_index=rank, device=torch.device("cpu")))
        for rank in range(3)
    ]
    for field in (0, 1, 2):
        assert torch.equal(torch.cat([part[field] for part in parts]), batch[field])
    assert parts[1].timestep.tolist() == [2, 3]
    assert parts[1].labels is None
    with pytest.raises(ValueError, match=r"4 processes.*got 6"):
        own_rows(batch, SimpleNamespace(num_processes=4, process_index=0))


def test_two_processes_follow_the_curve_of_one_with_the_doubled_batch(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--max_train_steps", "30", "--logging_steps", "1", "--learning_rate", "0.01"]
    workers = start(one, [*flags, "--train_batch_size", "8"], dropout=0.0)
    workers += start(two, [*flags, "--train_batch_size", "4"], processes=2, dropout=0.0)
    assert finish(workers) == [0, 0, 0]
    curves = [torch.tensor([line["loss"] for line in lines(folder)]) for folder in (one, two)]
    assert len(curves[0]) == 30
    assert curves[0][-5:].mean() < 0.9 * curves[0][:5].mean()
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=0)  # float32, 30 steps of Adam
    weights = [[line["weight"] for line in lines(folder, "validation.jsonl")] for folder in (one, two)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-3)


def test_two_processes_stop_at_the_same_step_and_go_on_with_the_same_bits(tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    workers = start(stopped, ENDLESS, processes=2)
    wait_for(stopped / "run" / "log.jsonl")
    os.kill(workers[1].pid, signal.SIGTERM)  # the other process is told by this one
    assert finish(workers) == [143, 143]
    (step,) = steps(stopped)
    longer = [*ENDLESS, "--max_train_steps", str(step + 5)]
    assert finish([*start(stopped, longer, processes=2), *start(whole, longer, processes=2)]) == [0] * 4
    assert_same_end(whole, stopped)
    assert finish(start(stopped, [*longer])) == [1]  # in one process it is another run, of other batches
    assert_one_line(stopped, "`images_per_batch` was 8, is 4")


def test_a_run_goes_on_with_another_number_of_processes_and_the_same_batches(tmp_path: Path) -> None:
    flags = [
        "--lr_scheduler",
        "constant",
        "--logging_steps",
        "1",
        "--checkpointing_steps",
        "10",
        "--learning_rate",
        "0.01",
    ]
    one, moved = tmp_path / "one", tmp_path / "moved"
    whole = start(one, [*flags, "--train_batch_size", "8", "--max_train_steps", "20"], dropout=0.0)
    half = start(moved, [*flags, "--train_batch_size", "4", "--max_train_steps", "10"], processes=2, dropout=0.0)
    assert finish([*whole, *half]) == [0, 0, 0]
    assert finish(start(moved, [*flags, "--train_batch_size", "8", "--max_train_steps", "20"], dropout=0.0)) == [0]
    curves = [torch.tensor([line["loss"] for line in lines(folder)]) for folder in (one, moved)]
    assert len(curves[1]) == 20
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=0)  # float32, 20 steps of Adam


def test_shards_follow_the_curve_of_copies_and_go_on_after_a_kill_with_the_same_bits(tmp_path: Path) -> None:
    copies, whole, killed = (tmp_path / name for name in ("copies", "whole", "killed"))
    flags = ["--logging_steps", "1"]
    workers = start(copies, flags, processes=2, dropout=0.0)
    workers += start(whole, flags, processes=2, dropout=0.0, fsdp=2)
    assert finish(workers) == [0] * 4
    curves = [torch.tensor([line["loss"] for line in lines(folder)]) for folder in (copies, whole)]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=0)  # float32
    assert "Sharded over 2 processes" in (whole / "output-0").read_text()
    ours, theirs = (load_file(folder / "run" / "model.safetensors") for folder in (whole, copies))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    workers = start(killed, flags, processes=2, dropout=0.0, fsdp=2)
    wait_for(killed / "run" / "checkpoint-4")
    kill(workers)
    assert finish(start(killed, flags, processes=2, dropout=0.0, fsdp=2)) == [0, 0]
    assert_same_end(whole, killed)


def test_the_first_version_of_fsdp_is_refused(tmp_path: Path) -> None:
    assert finish(start(tmp_path, processes=2, fsdp=1)) == [1, 1]
    assert_one_line(tmp_path, "`fsdp_version` must be 2 on CPUs, got 1")


def test_errors_are_told_once(tmp_path: Path) -> None:
    assert finish(start(tmp_path, processes=2, bad_call=1)) == [1, 1]
    assert_one_line(tmp_path, "nan at step 1")
    assert "rror" not in (tmp_path / "output-1").read_text()
    kill(start(tmp_path, processes=2))
