"""A run that is killed, stopped or damaged and started again ends with the bits of one left alone."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from tiny_training import ENDLESS, assert_one_line, assert_same_end, finish, kill, lines, start, steps, wait_for

from hfdiff.training.checkpoints import checkpoint_step, find_checkpoints, find_fault


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder)) == [0]
    return folder


def kill_at_random_moments(folder: Path, whole: Path, processes: int, kills: int, seconds: float) -> None:
    """Kills runs until there were so many kills, and lets each run end; the runs take about `seconds`."""
    moments, left, number = random.Random(processes), kills, 0
    while left:
        number += 1
        run = folder / f"run-{number}"
        while True:
            workers = start(run, processes=processes)
            wait_for(run / "output-0")
            if left:
                workers[0].join(moments.uniform(0, seconds))
            if not left or workers[0].exitcode is not None:
                break
            kill(workers)
            left -= 1
        assert finish(workers) == [0] * processes, (run / "output-0").read_text()
        assert_same_end(whole, run)


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(whole_run: Path, tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, whole_run, processes=1, kills=3, seconds=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_leave_no_trace(processes: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    finish(start(tmp_path / "warm-up", processes=processes))
    started = time.monotonic()
    assert finish(start(whole, processes=processes)) == [0] * processes
    kill_at_random_moments(tmp_path, whole, processes, kills=20, seconds=time.monotonic() - started)


# --- stops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_first_and_goes_on_with_the_same_bits(signum: int, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    workers = start(stopped, ENDLESS)
    wait_for(stopped / "run" / "log.jsonl")
    os.kill(workers[0].pid, signum)
    assert finish(workers) == [128 + signum]
    (step,) = steps(stopped)
    assert f"{signum.name}: stopped after step {step}" in (stopped / "output-0").read_text()
    longer = [*ENDLESS, "--max_train_steps", str(step + 5)]  # a constant learning rate lets it change
    assert finish([*start(stopped, longer), *start(whole, longer)]) == [0, 0]
    assert_same_end(whole, stopped)


def test_an_old_checkpoint_serves_when_the_newest_is_damaged(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    (tmp_path / "run" / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    (tmp_path / "run" / "log.jsonl").open("a").write('{"step": 12, "lo')  # a line torn by a kill
    assert finish(start(tmp_path)) == [0]
    assert_same_end(whole_run, tmp_path)
    assert "checkpoint-10 is damaged: model.safetensors has 0 bytes" in (tmp_path / "output-0").read_text()


def test_a_run_resumed_between_two_lines_of_the_log_writes_the_same_lines(whole_run: Path, tmp_path: Path) -> None:
    assert lines(whole_run)[1]["step"] == 6
    shutil.copytree(whole_run / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    shutil.copy(whole_run / "run" / "log.jsonl", tmp_path / "run")
    shutil.copy(whole_run / "run" / "validation.jsonl", tmp_path / "run")
    assert finish(start(tmp_path)) == [0]
    assert_same_end(whole_run, tmp_path)


# --- failures: one line, a non-zero exit, and the last good checkpoint ------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted((folder / "run").rglob("*")) if path.is_file()}


def test_a_run_with_other_settings_is_refused_and_nothing_is_written(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run / "run", tmp_path / "run")
    before = files_of(tmp_path)
    assert finish(start(tmp_path, ["--learning_rate", "0.5", "--max_train_steps", "20"])) == [1]
    assert_one_line(tmp_path, "`learning_rate` was 0.001, is 0.5, `max_train_steps` was 12, is 20;", "output_dir")
    assert files_of(tmp_path) == before


def test_harmless_settings_may_change(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run / "run" / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    flags = ["--logging_steps", "4", "--checkpointing_steps", "3", "--checkpoints_total_limit", "2"]
    assert finish(start(tmp_path, [*flags, "--gradient_accumulation_steps", "2"])) == [0]
    assert steps(tmp_path) == [9, 12]
    whole, ours = (folder / "run" / "checkpoint-12" / "model.safetensors" for folder in (whole_run, tmp_path))
    assert whole.read_bytes() == ours.read_bytes()


@pytest.mark.parametrize("bad_call", [1, 11])
def test_a_loss_that_is_not_finite_names_its_step(bad_call: int, tmp_path: Path) -> None:
    assert finish(start(tmp_path, bad_call=bad_call)) == [1]
    step = (bad_call + 1) // 2  # two calls a step
    left = "checkpoint-4 is intact" if step > 4 else "no checkpoint yet"
    assert_one_line(tmp_path, f"got nan at step {step};", left, "learning_rate")
    assert steps(tmp_path) == [done for done in (2, 4) if done < step]
    assert all(find_fault(path, checkpoint_step(path)) is None for path in find_checkpoints(tmp_path / "run"))


def test_a_disk_without_room_ends_a_run_and_with_room_it_goes_on(whole_run: Path, tmp_path: Path) -> None:
    assert finish(start(tmp_path, largest_file=3000)) == [1]
    assert_one_line(tmp_path, "Could not write", "checkpoint-2", "no checkpoint yet")
    assert not list((tmp_path / "run").glob("checkpoint*"))
    assert finish(start(tmp_path)) == [0]
    assert_same_end(whole_run, tmp_path)
