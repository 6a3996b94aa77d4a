"""Files that several processes may write at once, each whole or absent."""

import os
from pathlib import Path

from ..training.files import PARTIAL, replace, write_synced


def place_file(path: Path, content: bytes) -> None:
    """Writes a file beside its place, under a name of this process alone, and renames it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    write_synced(partial, content)
    replace(partial, path)
