"""What a training process owes its user and machine: errors in one line, agreement among processes, orderly stops."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc refuses more
TRIM_THRESHOLD = 2**30  # bytes
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h

Result = TypeVar("Result")


def run_script(main: Callable[[], None], name: str) -> None:
    """Runs a command or script of this name; where user or machine errs, ends the process with a line, no traceback.

    Errors that every process finds are told by the first alone. `python -X dev` shows tracebacks.
    """
    _end_with_launcher()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        if is_first_process() or isinstance(error, OSError):
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def is_first_process() -> bool:
    """Whether this is the process that speaks for all; known before there is an accelerator."""
    return os.environ.get("RANK", "0") == "0"


def _end_with_launcher() -> None:
    """Has a worker of `accelerate launch` stop when the launcher is killed, instead of training on unseen (Linux)."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def keep_freed_memory() -> None:
    """Lets glibc reuse the memory of freed activations instead of returning it to the system at every step.

    Fresh pages cost a page fault each, which on a CPU takes a good part of a training step. Elsewhere it does nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def on_main(accelerator: "Accelerator", work: Callable[[], Result]) -> Result:
    """Runs `work` on the main process alone; all get its result, and all end where it fails."""
    from accelerate.utils import broadcast_object_list

    error: Exception | None = None
    outcome: list[Any] = [None, False]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as failure:
            error, outcome[1] = failure, True
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1]:
        sys.exit(1)
    return outcome[0]


class StopRequest:
    """Notes SIGTERM and Ctrl-C inside its context, so that a loop can stop at the end of a step.

    Only the first of them counts: launchers send each several times. SIGQUIT (Ctrl-\\) stops at once.

    Args:
        accelerator: whose processes are to stop at the same step.
    """

    def __init__(self, accelerator: "Accelerator") -> None:
        import torch

        self.signum = 0
        self.loud = accelerator.is_main_process
        # On the host's own group, asking does not wait for the device.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def agreed(self) -> int:
        """The signal that stops the run, 0 for none; the same on every process, which must all ask."""
        if self.group is None:
            return self.signum
        import torch

        signum = torch.tensor(self.signum)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX, self.group)
        return int(signum)

    def stop(self, signum: int, step: int) -> NoReturn:
        """Ends the process as the signal asks, with the shell's status for it, 128 more than its number."""
        if self.loud:
            print(
                f"{signal.Signals(signum).name}: stopped after step {step}, which checkpoint-{step} holds; "
                "go on with `--resume_from_checkpoint latest`.",
                file=sys.stderr,
                flush=True,
            )
        sys.exit(128 + signum)
