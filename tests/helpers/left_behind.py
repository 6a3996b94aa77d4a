"""What a run of the tests could leave behind."""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN = "hfdiff-tests-"  # what the folders of test runs are called
LIBRARIES = ("huggingface", "torch", "gradio", "matplotlib", "selenium", "chromium", "triton", "pki")


def present(temporary: Path) -> set[Path]:
    """What is in the temporary folder, in the checkout, and where libraries write in the user's own folder."""
    beside = (path for path in temporary.iterdir() if not path.name.startswith(OWN))
    return {*beside, *_in_checkout(), *_in_home()}


def _in_checkout() -> Iterator[Path]:
    """All but caches; of out/, what it holds."""
    for folder, names, files in os.walk(ROOT):
        yield from (Path(folder, name) for name in files)
        names[:] = [name for name in names if name[0] != "." and name != "__pycache__"]
        yield from (Path(folder, name) for name in names)
        if Path(folder) == ROOT / "out":
            names.clear()


def _in_home() -> Iterator[Path]:
    """Three levels of the folders that libraries make unless told otherwise."""
    home = Path.home()
    for name in LIBRARIES:
        yield from home.glob(f".{name}*")
        for place in (".cache", ".config", ".local/share"):
            for pattern in (f"{name}*", f"{name}*/*", f"{name}*/*/*"):
                yield from home.joinpath(place).glob(pattern)
