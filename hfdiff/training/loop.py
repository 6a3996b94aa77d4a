"""The training loop both scripts share: accumulation, clipping, moving average, checkpoints and the log.

A run is a function of its settings and the number of the step. Batches are numbered, and the global random state, which
dropout uses, is seeded for each, so a run resumed from a checkpoint ends with the weights of an uninterrupted one.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from .config import TrainingSettings
from .data import Batch, derive_seed

CHECKPOINT = re.compile(r"checkpoint-(\d+)")

Batches = Callable[[int], Batch]
Loss = Callable[[nn.Module, Batch], Tensor]


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """The device, processes and precision of a run; also seeds the initial weights."""
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,  # the loop steps it, once per training step for any number of processes
    )
    torch.manual_seed(settings.seed)
    return accelerator


def train(settings: TrainingSettings, accelerator: Accelerator, model: nn.Module, batches: Batches, loss: Loss) -> None:
    """Trains a model in place up to `max_train_steps`, from a checkpoint where the settings name one.

    Leaves the model in evaluation mode with the weights to publish: their moving average where `use_ema` is set.

    Args:
        settings: of the run.
        accelerator: from [`make_accelerator`].
        model: the model.
        batches: gives batch n, for n from 0.
        loss: maps the model, perhaps wrapped for its device, and a batch to a scalar.

    Raises:
        ValueError: when the checkpoint is not there, or the output folder has checkpoints and none is to be resumed.
        FloatingPointError: when the loss is no longer finite.
    """
    folder = Path(settings.output_dir)
    checkpoint = find_checkpoint(folder, settings.resume_from_checkpoint)
    start = checkpoint_step(checkpoint) if checkpoint else 0
    model.to(accelerator.device).train()
    average = EMAModel(model.parameters(), decay=settings.ema_decay, foreach=True) if settings.use_ema else None
    wrapped, optimizer, lr_scheduler = accelerator.prepare(model, *make_optimizer(settings, model))
    if average:
        accelerator.register_for_checkpointing(average)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        if average:
            average.to(accelerator.device)

    with TrainingLog(folder, settings, start, silent=not accelerator.is_main_process) as log:
        for step in range(start + 1, settings.max_train_steps + 1):
            lr = lr_scheduler.get_last_lr()[0]
            own = step_batches(step, settings, accelerator, batches)
            log.add(step, update(accelerator, wrapped, optimizer, loss, own, settings.max_grad_norm), lr)
            lr_scheduler.step()
            if average:
                average.step(model.parameters())
            if step % settings.checkpointing_steps == 0 or step == settings.max_train_steps:
                save_checkpoint(accelerator, folder / f"checkpoint-{step}")
    if average:
        average.copy_to(model.parameters())
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).eval()


def make_optimizer(settings: TrainingSettings, model: nn.Module) -> tuple[Optimizer, LRScheduler]:
    """AdamW (Loshchilov & Hutter 2019) and the course of its learning rate, counted in training steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.adam_weight_decay, fused=True
    )
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    return optimizer, schedule


def step_batches(step: int, settings: TrainingSettings, accelerator: Accelerator, batches: Batches) -> Iterator[Batch]:
    """This process's batches of a training step (from 1); before each it seeds the global random state, for dropout."""
    for index in range(settings.gradient_accumulation_steps):
        common = (step - 1) * settings.gradient_accumulation_steps + index
        number = common * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(derive_seed(settings.seed, "dropout", number))
        yield batches(number).to(accelerator.device)


def update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss,
    batches: Iterable[Batch],
    max_grad_norm: float,
) -> Tensor:
    """One training step on its batches, by the gradient of their mean loss, clipped; returns that loss."""
    values = []
    for batch in batches:
        with accelerator.accumulate(model):
            value = loss(model, batch)
            accelerator.backward(value)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        values.append(value.detach())
    return torch.stack(values).mean()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Writes the state of a run; the folder has its name only once it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def find_checkpoint(output_dir: Path, name: str | None) -> Path | None:
    """The checkpoint to resume from, or None for a run from the start.

    Args:
        output_dir: the run's folder.
        name: None, "latest", which may find none, or a checkpoint's name.

    Raises:
        ValueError: when the checkpoint named is not there, or there are some and none is named.
    """
    found = {path.name: path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)}
    if name == "latest":
        return max(found.values(), key=checkpoint_step, default=None)
    if name is None and found:
        raise ValueError(
            f"`output_dir` must hold no checkpoints of an earlier run, got {sorted(found)} in {str(output_dir)!r}; "
            "pass `--resume_from_checkpoint latest`, or another folder."
        )
    if name is not None and name not in found:
        raise ValueError(
            f'`resume_from_checkpoint` must be "latest" or one of {sorted(found)} in {str(output_dir)!r}, got {name!r}.'
        )
    return found[name] if name else None


def checkpoint_step(checkpoint: Path) -> int:
    """Training steps done at a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


# --- the log ---------------------------------------------------------------------------------------------------------


class TrainingLog:
    """`log.jsonl` and a progress bar: every `logging_steps`, the mean loss since the line before and the learning rate.

    Args:
        folder: the run's folder.
        settings: of the run.
        start: training steps done already; later lines of an earlier run are dropped.
        silent: write and show nothing, on all processes but one.
    """

    def __init__(self, folder: Path, settings: TrainingSettings, start: int, *, silent: bool = False) -> None:
        self.every = settings.logging_steps
        self.images_per_step = settings.train_batch_size * settings.gradient_accumulation_steps
        self.path = None if silent else folder / "log.jsonl"
        self.bar = tqdm(total=settings.max_train_steps, initial=start, unit="step", disable=silent)
        self.values: list[Tensor] = []
        self.since = time.perf_counter()
        if self.path:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))

    def add(self, step: int, loss: Tensor, lr: float) -> None:
        """Takes note of a training step (from 1)."""
        self.values.append(loss)
        self.bar.update()
        if step % self.every:
            return
        mean = torch.stack(self.values).mean().item()  # the only wait for the device
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"The loss must stay finite, got {mean} by step {step}; resume from the last good checkpoint with "
                "a lower `learning_rate` or another `mixed_precision`."
            )
        rate = len(self.values) * self.images_per_step / (time.perf_counter() - self.since)
        self.bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{rate:.0f}")
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "loss": mean, "lr": lr}) + "\n")
        self.values, self.since = [], time.perf_counter()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
