"""The training loop both scripts share: accumulation, clipping, moving average, checkpoints, validation and the log.

A run is a function of its settings and the number of the step. Batches are numbered, and the global random state, which
dropout uses, is seeded for each, so a run resumed from a checkpoint ends with the weights of an uninterrupted one. A
batch belongs to all processes, each of which takes its rows of it, so their number does not change what is learned.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.files import remove_leftovers
from ..data.process import StopRequest, keep_freed_memory, on_main
from ..pipelines.optimization import fastest_dtype
from .batches import Batch, derive_seed
from .checkpoints import check_same_run, checkpoint_step, choose_checkpoint, read_checkpoint, write_checkpoint
from .config import TrainingSettings, as_json
from .log import TrainingLog, choose_tracker
from .power_average import drop_averages, is_written, write_averages
from .state import Stateful, TrainingState

Batches = Callable[[int], Batch]
Loss = Callable[[nn.Module, Batch], Tensor]
Monitor = Callable[[int], dict[str, float]]

CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """The device, processes, precision and tracker of a run; also seeds the initial weights.

    Raises:
        ValueError: when the tracker asked for is not installed, or for FSDP of version 1 on CPUs.
    """
    keep_freed_memory()
    tracker = choose_tracker(settings.report_to)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without this, accelerate's processes on CPUs do not meet
        mixed_precision=choose_precision(settings.mixed_precision),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
        step_scheduler_with_optimizer=False,  # the loop steps it, once per training step for any number of processes
        log_with=tracker,
        project_config=ProjectConfiguration(settings.output_dir, logging_dir=str(Path(settings.output_dir, "logs"))),
    )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _shard_on_cpus(accelerator)
    if tracker is None and settings.report_to is None:
        accelerator.print("Without tensorboard, only log.jsonl is written; `pip install tensorboard` for curves.")
    torch.manual_seed(settings.seed)
    return accelerator


def choose_precision(mixed_precision: str | None) -> str | None:
    """The same, where it is not "auto": that is bf16 where this machine's device computes in it, else "no"."""
    if mixed_precision != "auto":
        return mixed_precision
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return "bf16" if fastest_dtype(device) == torch.bfloat16 else "no"


def _shard_on_cpus(accelerator: Accelerator) -> None:
    """Takes up FSDP from accelerate's configuration on CPUs, too.

    accelerate 1.15 does so for GPUs and their like alone (`AcceleratorState.__init__`), and on CPUs would train whole
    copies without a word; torch's FSDP 2 shards over gloo as well.

    Raises:
        ValueError: for version 1.
    """
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` must be 2 on CPUs, got {plugin.fsdp_version}; write so in accelerate's configuration."
        )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.print(f"Sharded over {accelerator.num_processes} processes, on their CPUs.")


def train(
    settings: TrainingSettings,
    accelerator: Accelerator,
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    stateful: Sequence[Stateful] = (),
    monitor: Monitor | None = None,
) -> None:
    """Trains a model in place up to `max_train_steps`, from a checkpoint where the settings name one.

    Leaves the model in evaluation mode with the weights to publish: their moving average where `use_ema` is set.
    SIGTERM and Ctrl-C end the process after a checkpoint at the end of the step.

    Args:
        settings: of the run.
        accelerator: from [`make_accelerator`].
        model: the model.
        batches: gives batch n, for n from 0: `train_batch_size` images for each process, in the processes' order. With
            `num_epochs`, `len(batches)` is the number of batches in an epoch.
        loss: maps the model, perhaps wrapped for its device, and a batch to a scalar.
        stateful: further objects that checkpoints hold.
        monitor: measures the model as it would be published after a training step, every `validation_steps` and at the
            last; called on every process, without gradients and with a random state of its own.

    Raises:
        ValueError: when the output folder has checkpoints and none is to be resumed, or when the one to resume is not
            there, is damaged or is of another run.
        FloatingPointError: when the loss or a weight is no longer finite.
        OSError: when a checkpoint cannot be written.
    """
    settings = count_steps(settings, batches)
    folder, run = Path(settings.output_dir), describe(settings, accelerator)
    checkpoint = on_main(accelerator, lambda: open_folder(folder, settings, run))
    start = checkpoint_step(checkpoint) if checkpoint else 0
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    log = TrainingLog(settings, accelerator)
    state = TrainingState(settings, accelerator, model, [log, *stateful])
    if checkpoint:
        state.restore(on_main(accelerator, lambda: read_checkpoint(checkpoint)), start)
    on_main(accelerator, lambda: remove_leftovers(folder))
    on_main(accelerator, lambda: drop_averages(folder, start))
    signum = 0
    with StopRequest(accelerator) as request, log.running(start):
        for step in range(start + 1, settings.max_train_steps + 1):
            lr = state.lr_scheduler.get_last_lr()[0]
            own = step_batches(step, settings, accelerator, batches)
            value = update(accelerator, state.model, state.optimizer, loss, own, settings.max_grad_norm)
            state.advance()
            log.add(step, value, lr)
            if is_written(step, settings.max_train_steps, settings.average_snapshots):
                averages = state.power_averages()
                on_main(accelerator, partial(write_averages, folder, step, averages))
            if monitor and is_due(step, settings.validation_steps, settings):
                log.validation(step, measure(monitor, step, settings, state))
            signum = request.agreed()
            if signum or is_due(step, settings.checkpointing_steps, settings):
                save(step, settings, run, state, log)
            if signum:
                break
    if signum:
        request.stop(signum, step)
    state.publish()


def count_steps(settings: TrainingSettings, batches: Batches) -> TrainingSettings:
    """The same settings with `max_train_steps` in the place of `num_epochs`."""
    if settings.num_epochs is None:
        return settings
    epoch = len(batches)  # type: ignore[arg-type]
    steps = math.ceil(settings.num_epochs * epoch / settings.gradient_accumulation_steps)
    return replace(settings, max_train_steps=steps, num_epochs=None)


def describe(settings: TrainingSettings, accelerator: Accelerator) -> dict[str, Any]:
    """What makes a run that run, as JSON values: its script, settings, processes and precision."""
    return {
        **as_json(settings),
        "script": type(settings).__name__,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def open_folder(folder: Path, settings: TrainingSettings, run: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, if any, after making sure that it is of this run.

    Raises:
        ValueError: as [`choose_checkpoint`], or when it is of another run.
    """
    checkpoint = choose_checkpoint(folder, settings.resume_from_checkpoint)
    if checkpoint:
        done, constant = checkpoint_step(checkpoint), settings.lr_scheduler in CONSTANT_SCHEDULES
        grows = {"max_train_steps"} if constant and settings.max_train_steps >= done else set()
        check_same_run(checkpoint, run, settings.may_change | grows, as_json(type(settings)()))
    return checkpoint


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Has a model recompute activations in the backward pass instead of keeping them.

    Raises:
        ValueError: when it cannot.
    """
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"`gradient_checkpointing` must be off for a model that has none, got {type(model).__name__}; leave it out."
        )
    model.enable_gradient_checkpointing()  # type: ignore[operator]


def is_due(step: int, every: int | None, settings: TrainingSettings) -> bool:
    """Whether something happens after a step: every so many, if given, and after the last."""
    return step == settings.max_train_steps or (every is not None and step % every == 0)


def save(step: int, settings: TrainingSettings, run: dict[str, Any], state: TrainingState, log: TrainingLog) -> None:
    """Writes a checkpoint of the state after a step; all processes must ask."""
    log.read(step)
    log.sync()
    snapshot = state.snapshot()
    folder, limit = Path(settings.output_dir), settings.checkpoints_total_limit
    on_main(state.accelerator, lambda: write_checkpoint(folder, step, snapshot, run, limit))


def measure(monitor: Monitor, step: int, settings: TrainingSettings, state: TrainingState) -> dict[str, float]:
    """The monitor's numbers of the model as it would be published; its random state depends on the step alone."""
    devices = [state.accelerator.device] if state.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices), state.published(), torch.no_grad():
        torch.manual_seed(derive_seed(settings.seed, "monitor", step))
        return monitor(step)


def step_batches(step: int, settings: TrainingSettings, accelerator: Accelerator, batches: Batches) -> Iterator[Batch]:
    """This process's rows of a training step's batches (from 1); before each it seeds the global state, for dropout."""
    for index in range(settings.gradient_accumulation_steps):
        number = (step - 1) * settings.gradient_accumulation_steps + index
        batch = batches(number)
        torch.manual_seed(
            derive_seed(settings.seed, "dropout", number * accelerator.num_processes + accelerator.process_index)
        )
        yield own_rows(batch, accelerator)


def own_rows(batch: Batch, accelerator: Accelerator) -> Batch:
    """This process's rows of a batch, on its device, without waiting for that.

    Raises:
        ValueError: when the batch has not the same number of rows for each process.
    """
    size, rest = divmod(len(batch.x0), accelerator.num_processes)
    if rest:
        raise ValueError(
            f"A batch must have as many images for each of the {accelerator.num_processes} processes, got "
            f"{len(batch.x0)} in all; make it of `train_batch_size` times the processes."
        )
    rows = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)

    return batch._replace(
        **{
            name: _move(values[rows], accelerator.device)
            for name, values in batch._asdict().items()
            if values is not None
        }
    )


def _move(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


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
