"""Files and folders that are whole or absent, whatever happens while they are written.

They are written beside their place under a name that ends in ".partial", synchronised to the disk and renamed.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(source: Path, target: Path) -> None:
    """Renames a file or folder into the place of another, and waits until the disk knows."""
    if target.is_dir():  # a rename replaces files and empty folders only
        discard(target)
    os.replace(source, target)
    sync(target.parent)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to be filled, which becomes the destination when all has gone well; otherwise there is none.

    Raises:
        ValueError: for a destination with files.
    """
    if destination.exists() and any(destination.iterdir()):
        raise ValueError(f"`destination` must be a new or an empty folder, got {str(destination)!r}; name another.")
    partial = destination.with_name(f"{destination.name}{PARTIAL}")
    discard(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Removes a folder, if it is there, so that its name goes first and never stands for a part of it."""
    if path.exists() and not path.name.endswith(PARTIAL):
        hidden = path.with_name(f"{path.name}.old{PARTIAL}")
        shutil.rmtree(hidden, ignore_errors=True)
        path = path.rename(hidden)
    if path.exists():
        shutil.rmtree(path)


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a killed run left half written."""
    for path in output_dir.glob(f"*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, or of a folder's weights one after the other."""
    return files_checksum([path] if path.is_file() else weight_files(path))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, or where it has none, what torch wrote."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def files_checksum(files: Sequence[Path]) -> str:
    """SHA-256 of files one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def place_file(path: Path, content: bytes) -> None:
    """Writes a file beside its place, under a name of this process alone, and renames it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    write_synced(partial, content)
    replace(partial, path)
