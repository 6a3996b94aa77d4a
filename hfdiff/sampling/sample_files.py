"""Drawn images in files: a shard per batch, shared among processes, then one npz file as guided-diffusion writes it.

A shard is whole or absent, so a run that was killed goes on with the shards that are missing.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm.auto import tqdm

from ..data.files import PARTIAL, place_file, remove_leftovers, replace, sync
from ..data.image_source import LABELS, PROVENANCE
from ..data.process import on_main
from .sampler import Sampler, one_thread

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.npz"
LONGEST_SHARD = timedelta(days=7)  # that a process waits for the others

Made = TypeVar("Made")


def join_processes() -> Accelerator:
    """The device of this process, and the other processes of `accelerate launch`, on GPUs or CPUs."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without this, accelerate's processes on CPUs do not meet
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_SHARD)],
    )


def only_main(accelerator: Accelerator, make: Callable[[], Made]) -> Made | None:
    """What `make` gives on the main process, None on the others; all end where it fails.

    Differs from `on_main` in that nothing is sent to the others.
    """
    made: list[Made] = []
    on_main(accelerator, lambda: made.append(make()))
    return made[0] if made else None


def default_folder(sampler: Sampler) -> Path:
    """Where a set goes that was given no folder: the same set in the same place."""
    digest = hashlib.sha256(json.dumps(sampler.provenance, sort_keys=True).encode()).hexdigest()
    return Path("out", "samples", f"{Path(sampler.provenance['pipeline']).name}-{digest[:8]}")


def draw_samples(sampler: Sampler, folder: Path, accelerator: Accelerator) -> Path:
    """Draws what is missing of a set of images, on all processes, which must share the folder's disk.

    Args:
        sampler: of the set, the same on every process.
        folder: holds the shards until all are there; then `samples.npz`, with the images in arr_0, uint8 (N, H, W, C),
            their classes in arr_1, (N,), where they have some, and a record of what they are.
        accelerator: from [`join_processes`].

    Returns:
        The npz file.

    Raises:
        ValueError: for a folder of another set, or a broken shard.
    """
    samples = folder / SAMPLES_FILE
    on_main(accelerator, lambda: _claim(folder, sampler.provenance))
    if not samples.exists():
        own = range(accelerator.process_index, sampler.num_batches, accelerator.num_processes)
        for batch in tqdm(own, desc=str(folder), delay=5, disable=not accelerator.is_main_process):
            if not (shard := _shard(folder, batch)).exists():
                with one_thread():
                    np.save(content := io.BytesIO(), sampler.draw(batch))
                place_file(shard, content.getvalue())
    accelerator.wait_for_everyone()  # before the main process makes what the others looked for
    on_main(accelerator, lambda: _merge(folder, sampler))
    return samples


def _shard(folder: Path, batch: int) -> Path:
    return folder / f"shard-{batch:05d}.npy"


def _claim(folder: Path, provenance: dict) -> None:
    """Makes the folder this set's, or makes sure that it is."""
    run = folder / RUN_FILE
    if run.exists():
        found = json.loads(run.read_text())
        changed = [
            f"`{name}` was {found.get(name)!r}, is {provenance.get(name)!r}"
            for name in found | provenance
            if found.get(name) != provenance.get(name)
        ]
        if changed:
            raise ValueError(f"{str(folder)!r} holds other samples: {', '.join(changed)}; name another folder.")
    elif folder.exists() and any(not path.name.endswith(PARTIAL) for path in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} holds files but no {RUN_FILE}, so no samples; name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    place_file(run, (json.dumps(provenance, indent=2, ensure_ascii=False) + "\n").encode())


def _merge(folder: Path, sampler: Sampler) -> None:
    """Puts the shards into one file, one at a time, and then removes them."""
    samples = folder / SAMPLES_FILE
    shards = [_shard(folder, batch) for batch in range(sampler.num_batches)]
    if not samples.exists():
        partial = samples.with_name(f"{samples.name}{PARTIAL}")
        with zipfile.ZipFile(partial, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                shape = (sampler.settings.num_images, *_read_shard(shards[0]).shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                written = sum(stream.write(_read_shard(shard).tobytes()) for shard in shards)
            if written != np.prod(shape):
                raise ValueError(f"The shards in {str(folder)!r} do not make {shape[0]} images; remove the folder.")
            arrays = {PROVENANCE: np.asarray(json.dumps(sampler.provenance))}
            if sampler.labels is not None:
                arrays[LABELS] = sampler.labels.numpy()
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as stream:
                    np.lib.format.write_array(stream, array)
        sync(partial)
        replace(partial, samples)
    for shard in shards:
        shard.unlink(missing_ok=True)


def _read_shard(shard: Path) -> np.ndarray:
    try:
        return np.load(shard)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"The shard {str(shard)!r} cannot be read: {error}; remove it and run again.") from error
