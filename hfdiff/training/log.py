"""What a run tells while it runs: `log.jsonl`, `validation.jsonl`, accelerate's trackers and one progress bar."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from tqdm.auto import tqdm

from ..data.files import PARTIAL, replace, sync, write_synced
from .checkpoints import find_checkpoints
from .config import TrainingSettings

LOG, VALIDATION = "log.jsonl", "validation.jsonl"
TRACKER, NO_TRACKER = "tensorboard", "none"
PROJECT = "hfdiff"  # the trackers' name for a group of runs


def choose_tracker(report_to: str | None) -> str | None:
    """The tracker to log with, or None; by default tensorboard, where it is installed.

    Raises:
        ValueError: when the one asked for is not installed.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to is None:
        return TRACKER if TRACKER in installed else None
    if report_to not in (NO_TRACKER, *installed):
        raise ValueError(
            f"`report_to` must be one of the installed trackers {installed} or {NO_TRACKER!r}, got {report_to!r}; "
            f"`pip install {report_to}`, or leave it out."
        )
    return None if report_to == NO_TRACKER else report_to


class TrainingLog:
    """Every `logging_steps`, the mean loss since the line before and the learning rate; numbers of the validation.

    The losses since the last line are part of a run's state, so that a resumed run writes the same lines. They stay on
    the device, unread, until a line or a checkpoint needs them.

    Args:
        settings: of the run.
        accelerator: whose main process writes; a loss is the mean over all.
    """

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator) -> None:
        self.folder = Path(settings.output_dir)
        self.every = settings.logging_steps
        self.total = settings.max_train_steps
        self.images_per_step = (
            settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
        )
        self.accelerator = accelerator
        self.losses: list[float] = []  # since the last line
        self.unread: list[Tensor] = []  # of this process, after those

    def state_dict(self) -> dict[str, list[float]]:
        """The losses since the last line, as far as they are read."""
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        """Takes up the losses since the last line."""
        self.losses = list(state_dict["losses"])

    @contextmanager
    def running(self, step: int) -> Iterator[None]:
        """The time of training after `step` steps: drops the lines of later ones, shows the bar, ends the trackers."""
        main = self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (LOG, VALIDATION):
                _keep_lines(self.folder / name, step)
        purge = {TRACKER: {"purge_step": step + 1}}
        self.accelerator.init_trackers(PROJECT, init_kwargs=purge)
        self.since, self.start_of_line = time.perf_counter(), step
        try:
            with tqdm(total=self.total, initial=step, unit="step", disable=not main) as self.bar:
                yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def add(self, step: int, loss: Tensor, lr: float) -> None:
        """Takes note of a training step (from 1)."""
        self.unread.append(loss)
        self.bar.update()
        if step % self.every:
            return
        self.read(step)
        mean = math.fsum(self.losses) / len(self.losses)
        rate = (step - self.start_of_line) * self.images_per_step / (time.perf_counter() - self.since)
        self.bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{rate:.0f}")
        self._write(LOG, step, {"loss": mean, "lr": lr})
        self.losses, self.since, self.start_of_line = [], time.perf_counter(), step

    def validation(self, step: int, numbers: dict[str, float]) -> None:
        """Writes what a model was found to be worth after a training step."""
        self._write(VALIDATION, step, numbers)

    def read(self, step: int) -> None:
        """Reads the losses up to a step from all processes, which must all ask.

        Raises:
            FloatingPointError: when one of them is not finite.
        """
        if not self.unread:
            return
        of_all = self.accelerator.gather(torch.stack(self.unread)).view(-1, len(self.unread))
        means = [math.fsum(losses) / len(losses) for losses in of_all.T.tolist()]
        for number, mean in enumerate(means, start=step + 1 - len(means)):
            if not math.isfinite(mean):
                self._refuse(number, mean)
        self.losses += means
        self.unread = []

    def _refuse(self, step: int, loss: float) -> None:
        found = find_checkpoints(self.folder)
        left = f"{found[-1].name} is intact" if found else "there is no checkpoint yet"
        raise FloatingPointError(
            f"The loss must stay finite, got {loss} at step {step}; {left}. Start another run with a lower "
            "`learning_rate` or another `mixed_precision`."
        )

    def sync(self) -> None:
        """Waits until the disk has every line."""
        if self.accelerator.is_main_process:
            for name in (LOG, VALIDATION):
                if (self.folder / name).exists():
                    sync(self.folder / name)

    def _write(self, name: str, step: int, numbers: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            with (self.folder / name).open("a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:
            raise OSError(
                f"Could not write {self.folder / name}: {error}; the checkpoints are intact. Make room, then go on "
                "with `--resume_from_checkpoint latest`."
            ) from error
        self.accelerator.log(numbers, step=step)


def _keep_lines(path: Path, step: int) -> None:
    """Drops a log's lines of later steps, and what a kill or a full disk left of one."""
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept = "".join(line for line in lines if 0 <= _step_of(line) <= step)
    partial = path.with_name(path.name + PARTIAL)
    write_synced(partial, kept.encode())
    replace(partial, path)


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else -1
    except ValueError:
        return -1
