"""`hfdiff` commands in processes of their own, as `accelerate launch` starts them, that share one import of torch."""

import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tiny_training import context, free_port

from hfdiff.cli import main


def _work(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.exit(main(arguments))


def start(folder: Path, arguments: Sequence[object], processes: int = 1) -> list[BaseProcess]:
    """Starts a command in so many processes, whose output goes to `folder`/output-RANK."""
    folder.mkdir(exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    workers = []
    for rank in range(processes):
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        workers.append(context.Process(target=_work, args=(list(map(str, arguments)), folder / f"output-{rank}", own)))
        workers[-1].start()
    return workers
