"""Checkpoints on disk: `OUTPUT/checkpoint-N/`, whole or absent, with a manifest of checksums.

    checkpoint-N/model.safetensors     the weights, under the model's own names
                 average.safetensors   their moving average, under the same names, where the run keeps one
                 average-0.05.safetensors, average-0.10.safetensors   further ones, of [`power_average`]
                 training.pt           the optimizer, the learning rate and whatever else the run remembers
                 manifest.json         step and settings of the run, size and SHA-256 of each file

Whatever is written here is written beside its place under a name that ends in ".partial", synchronised to the disk and
renamed, so a name never stands for half a file. All of it is the main process's work.
"""

import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..data.files import PARTIAL, discard, replace, sync, write_synced

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
TRAINING = "training.pt"
BLOCK = 2**20  # bytes

logger = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """What a checkpoint holds.

    Args:
        weights: "model" and, where there is one, "average": tensors by name.
        training: everything else, of tensors, numbers, strings, lists and dicts.
    """

    weights: dict[str, dict[str, Tensor]]
    training: dict[str, Any]


# --- writing ---------------------------------------------------------------------------------------------------------


def write_checkpoint(
    output_dir: Path, step: int, snapshot: Snapshot, run: dict[str, Any], limit: int | None = None
) -> None:
    """Writes a checkpoint, makes sure that it can be read, and only then removes old ones.

    Args:
        output_dir: the run's folder.
        step: training steps done.
        snapshot: the state after them.
        run: the settings, JSON values.
        limit: checkpoints to keep, the newest; None keeps all.

    Raises:
        FloatingPointError: when a weight is not finite; nothing is written.
        OSError: when the disk is full or does not give back what was written; what was there before is intact.
    """
    for name, tensor in snapshot.weights["model"].items():
        if not tensor.isfinite().all():
            raise FloatingPointError(
                f"The weights must stay finite, got others in {name!r} after step {step}; {_intact(output_dir)}. "
                "Start another run with a lower `learning_rate` or another `mixed_precision`."
            )
    folder = output_dir / f"checkpoint-{step}"
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        discard(partial)
        partial.mkdir(parents=True)
        files = {f"{name}.safetensors": safetensors.torch.save(tensors) for name, tensors in snapshot.weights.items()}
        files[TRAINING] = _to_bytes(snapshot.training)
        for name, content in files.items():
            write_synced(partial / name, content)
        write_synced(partial / MANIFEST, _make_manifest(step, run, files))
        if fault := find_fault(partial, step):
            raise OSError(fault)
        replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"Could not write {folder}: {error}; {_intact(output_dir)}. Make room, then go on with "
            "`--resume_from_checkpoint latest`."
        ) from error
    older = [path for path in find_checkpoints(output_dir) if checkpoint_step(path) < step]
    for path in older[: len(older) + 1 - limit] if limit else []:
        discard(path)


def _intact(output_dir: Path) -> str:
    found = find_checkpoints(output_dir)
    return f"{found[-1].name} is intact" if found else "there is no checkpoint yet"


def _to_bytes(training: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(training, buffer)
    return buffer.getvalue()


def _make_manifest(step: int, run: dict[str, Any], files: dict[str, bytes]) -> bytes:
    sums = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    manifest: dict[str, Any] = {"step": step, "settings": run, "files": sums}
    return json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2).encode()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def placed(output_dir: Path | str) -> Iterator[Path]:
    """A folder to write into, whose files and folders then replace those of the same names in `output_dir`.

    Each is renamed into its place when all are written, so a full disk or a kill leaves no half of a model there.

    Args:
        output_dir: where they go, beside what it holds already.

    Raises:
        OSError: when they cannot be written; `output_dir` is then as it was.
    """
    output_dir = Path(output_dir)
    partial = output_dir / f"model{PARTIAL}"
    try:
        discard(partial)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            sync(path)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"Could not write the model to {output_dir}: {error}; {_intact(output_dir)}. Make room, then go on with "
            "`--resume_from_checkpoint latest`."
        ) from error
    for path in sorted(partial.iterdir(), key=lambda path: path.is_file()):  # model_index.json after what it names
        replace(path, output_dir / path.name)
    discard(partial)


# --- reading ---------------------------------------------------------------------------------------------------------


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest last; they may be damaged."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Training steps done at a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def choose_checkpoint(output_dir: Path, name: str | None) -> Path | None:
    """The checkpoint to resume from, or None for a run from the start.

    Args:
        output_dir: the run's folder.
        name: None, "latest", which passes over damaged ones with a warning and may find none, or a checkpoint's name.

    Raises:
        ValueError: when the checkpoint named is not there or damaged, when all are damaged, or when there are some and
            none is named.
    """
    found = find_checkpoints(output_dir)
    names = [path.name for path in found]
    if name is None and found:
        raise ValueError(
            f"`output_dir` must hold no checkpoints of an earlier run, got {names} in {str(output_dir)!r}; "
            "pass `--resume_from_checkpoint latest`, or another folder."
        )
    if name is None or (name == "latest" and not found):
        return None
    if name != "latest" and name not in names:
        raise ValueError(
            f'`resume_from_checkpoint` must be "latest" or one of {names} in {str(output_dir)!r}, got {name!r}.'
        )
    for path in reversed(found if name == "latest" else [output_dir / name]):
        fault = find_fault(path, checkpoint_step(path))
        if fault is None:
            return path
        logger.warning("%s is damaged: %s; passing over it.", path, fault)
    raise ValueError(
        f"`resume_from_checkpoint` must name an undamaged checkpoint in {str(output_dir)!r}, got {name!r} and found "
        "none; name another, or start again in another `output_dir`."
    )


def find_fault(checkpoint: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        checkpoint: its folder.
        step: training steps it should hold.
    """
    try:
        manifest = read_manifest(checkpoint)
    except (OSError, ValueError, TypeError, KeyError):
        return f"{MANIFEST} is missing or damaged"
    if manifest["step"] != step:
        return f"{MANIFEST} is of step {manifest['step']}"
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} does not match its checksum"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: when it does not match its own checksum.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    expected = manifest.pop("sha256")
    if _digest(manifest) != expected:
        raise ValueError(f"{checkpoint / MANIFEST} must match its checksum, got another.")
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_same_run(
    checkpoint: Path, run: dict[str, Any], may_change: frozenset[str], defaults: dict[str, Any] | None = None
) -> None:
    """Refuses a checkpoint of another run.

    Args:
        checkpoint: of which run?
        run: the settings of this one, JSON values.
        may_change: settings in which they may differ.
        defaults: of settings that an earlier version's checkpoint does not know.

    Raises:
        ValueError: when they differ in others; it lists them.
    """
    theirs = with_global_batch({**(defaults or {}), **read_manifest(checkpoint)["settings"]})
    run = with_global_batch(run)
    names = sorted((theirs.keys() | run.keys()) - may_change)
    differ = [
        f"`{name}` was {theirs.get(name)!r}, is {run.get(name)!r}"
        for name in names
        if theirs.get(name) != run.get(name)
    ]
    if differ:
        raise ValueError(
            f"`resume_from_checkpoint` must name a checkpoint of the same run, got {str(checkpoint)!r} of another: "
            f"{', '.join(differ)}; give the same settings, or start another run from its weights in another "
            "`output_dir`, by `--init_from` and the folder of what was trained."
        )


def with_global_batch(run: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with its images per batch in place of their share and number: the batches are the same."""
    others = {name: value for name, value in run.items() if name not in ("train_batch_size", "num_processes")}
    return {**others, "images_per_batch": run.get("train_batch_size", 1) * run.get("num_processes", 1)}


def read_checkpoint(checkpoint: Path) -> Snapshot:
    """The state a checkpoint holds, on the CPU."""
    weights = {path.stem: safetensors.torch.load(path.read_bytes()) for path in checkpoint.glob("*.safetensors")}
    return Snapshot(weights, torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True))
