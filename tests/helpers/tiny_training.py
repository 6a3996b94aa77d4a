"""A training run small enough to be killed many times, in processes of its own that share one import of torch."""

import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hfdiff.data.labelled import LabelledImages
from hfdiff.data.process import run_script
from hfdiff.training.batches import Batch, BatchStream
from hfdiff.training.checkpoints import placed
from hfdiff.training.config import TrainingSettings, parse_settings
from hfdiff.training.loop import make_accelerator, train

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["hfdiff.training.loop"])  # this file is not on the path yet

ENDLESS = ["--max_train_steps", "100000", "--lr_scheduler", "constant", "--checkpointing_steps", "100000"]
FLAGS = [
    *("--max_train_steps", "12", "--train_batch_size", "4", "--gradient_accumulation_steps", "2"),
    *("--checkpointing_steps", "2", "--logging_steps", "3", "--validation_steps", "5", "--lr_warmup_steps", "2"),
    *("--report_to", "none", "--resume_from_checkpoint", "latest"),
]


class TinyModel(nn.Module):
    """Predicts the noise in images of 2x2 pixels, with dropout."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 4))

    def forward(self, sample: Tensor) -> Tensor:
        return self.layers(sample).view_as(sample)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    noisy = batch.x0 + batch.noise * batch.timestep.view(-1, 1, 1, 1) / 10
    return (model(noisy) - batch.noise).square().mean()


class CountedLoss:
    """The same loss, which remembers how often it was asked for, and can turn bad at one of the calls."""

    def __init__(self, bad_call: int | None = None) -> None:
        self.calls, self.bad_call = 0, bad_call

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.calls += 1
        return loss(model, batch) * (float("nan") if self.calls == self.bad_call else 1)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.calls = state_dict["calls"]


def make_batches(settings: TrainingSettings, processes: int = 1) -> BatchStream:
    images = torch.rand(18, 1, 2, 2, generator=torch.Generator().manual_seed(7)) * 2 - 1
    return BatchStream(LabelledImages(images, None, []), settings.train_batch_size * processes, 10, settings.seed)


def main(flags: Sequence[str], *, dropout: float = 0.2, bad_call: int | None = None) -> None:
    """Trains, measures and saves a model, as the scripts do."""
    settings = parse_settings(TrainingSettings, flags)
    accelerator = make_accelerator(settings)
    model, counted = TinyModel(dropout), CountedLoss(bad_call)

    def monitor(step: int) -> dict[str, float]:
        return {"weight": model.layers[1].weight.mean().item(), "draw": torch.rand(()).item()}

    batches = make_batches(settings, accelerator.num_processes)
    train(settings, accelerator, model, batches, counted, stateful=[counted], monitor=monitor)
    if accelerator.is_main_process:
        with placed(settings.output_dir) as folder:
            save_file(model.state_dict(), folder / "model.safetensors")


def _work(flags: Sequence[str], options: dict, log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if largest_file := options.pop("largest_file", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.argv = ["train.py"]
        run_script(lambda: main(flags, **options), "train.py")


def start(
    folder: Path, flags: Sequence[str] = (), *, processes: int = 1, fsdp: int | None = None, **options: object
) -> list[BaseProcess]:
    """Starts a run in `folder`/run, in so many processes, whose output goes to `folder`/output-RANK.

    With `fsdp`, accelerate's configuration asks for FSDP of this version.
    The options are those of `main`, and `largest_file`: more bytes than this do not fit into one.
    """
    folder.mkdir(exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    if fsdp:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(fsdp), "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
        environment |= {"FSDP_RESHARD_AFTER_FORWARD": "true" if fsdp == 2 else "FULL_SHARD"}
    workers = []
    for rank in range(processes):
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        arguments = ([*FLAGS, "--output_dir", str(folder / "run"), *flags], options, folder / f"output-{rank}", own)
        workers.append(context.Process(target=_work, args=arguments))
        workers[-1].start()
    return workers


def finish(workers: Sequence[BaseProcess]) -> list[int | None]:
    """Waits for a run and returns the processes' exit codes."""
    for worker in workers:
        worker.join(60)
    return [worker.exitcode for worker in workers]


def kill(workers: Sequence[BaseProcess]) -> None:
    """SIGKILL."""
    for worker in workers:
        worker.kill()
    finish(workers)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def lines(folder: Path, name: str = "log.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    """The checkpoints of a run."""
    return sorted(int(path.name.split("-")[1]) for path in (folder / "run").glob("checkpoint-*"))


def assert_same_end(first: Path, second: Path) -> None:
    """Both runs ended with the same bits: model, logs, and the last checkpoint with average and optimizer."""
    last = f"checkpoint-{steps(first)[-1]}"
    names = [*("model.safetensors", "log.jsonl", "validation.jsonl"), f"{last}/model.safetensors"]
    for name in [*names, f"{last}/average.safetensors"]:
        assert (first / "run" / name).read_bytes() == (second / "run" / name).read_bytes(), name
    ours, theirs = (torch.load(folder / "run" / last / "training.pt", weights_only=True) for folder in (first, second))
    assert_equal(ours, theirs)
    assert not list((second / "run").glob("*.partial"))


def assert_equal(first: object, second: object) -> None:
    """Nested dicts and lists of the same tensors and values."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        for ours, theirs in itertools.zip_longest(first, second):
            assert_equal(ours, theirs)
    else:
        assert first == second


def wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.002)


def assert_one_line(folder: Path, *parts: str) -> None:
    (message,) = [line for line in (folder / "output-0").read_text().splitlines() if "error" in line.lower()]
    assert message.startswith("train.py: error: ")
    assert all(part in message for part in parts), message
    assert "Traceback" not in (folder / "output-0").read_text()
