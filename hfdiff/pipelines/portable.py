"""The code that a saved pipeline carries, so that it opens where hfdiff is not installed.

diffusers runs a folder's own code, if trusted, by the `[file, class]` entries of its `model_index.json`. It copies that
file and the siblings it imports; and of a repository on the Hub it fetches, of folders with weights, no code but what
the entry file at the root names. So the entry file names all.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers.utils.dynamic_modules_utils import get_relative_imports

INDEX = "model_index.json"
ENTRY = "pipeline"  # the name `custom_pipeline` looks for
PACKAGE = __name__.partition(".")[0]
PACKAGES = (PACKAGE, "diffusers_modules")  # whose classes travel; the second holds code that diffusers opened
HEADER = (
    '"""Opens this folder where hfdiff is not installed: diffusers runs it with `trust_remote_code=True`.\n\n'
    'What is imported for types alone, and never run, are the files that diffusers is to fetch.\n"""\n\n'
)


def add_code(folder: str | os.PathLike, pipeline_class: type) -> None:
    """Copies the source of a saved pipeline's classes into its folder and names it in `model_index.json`.

    Classes of other libraries stay as they are.

    Args:
        folder: of the saved pipeline.
        pipeline_class: the class that saved it.
    """
    folder = Path(folder)
    index = json.loads(folder.joinpath(INDEX).read_text())
    parts = []
    for name, entry in index.items():
        if isinstance(entry, list) and not name.startswith("_") and _travels(entry[0]):
            file, *siblings = _copy_source(entry[0], folder / name)
            index[name] = [file, entry[1]]
            parts += [f"{name}.{sibling}" for sibling in siblings]
    if _travels(pipeline_class.__module__):
        file, *siblings = _copy_source(pipeline_class.__module__, folder)
        folder.joinpath(f"{ENTRY}.py").write_text(_entry_file(file, pipeline_class.__name__, [*siblings, *parts]))
        index["_class_name"] = [ENTRY, pipeline_class.__name__]
    folder.joinpath(INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def use_imported(index: Mapping[str, Any]) -> dict[str, Any]:
    """A `model_index.json` whose own code is replaced by the classes of the same names that this package has imported.

    So nothing of the folder is run. Code of other classes stays, and is for diffusers to ask about.
    """
    found = {}
    for name, entry in index.items():
        if name == "_class_name" and isinstance(entry, list):
            entry = entry[1]
        elif isinstance(entry, list) and isinstance(entry[0], str):
            entry = [_imported_module(*entry) or entry[0], entry[1]]
        found[name] = entry
    return found


def _imported_module(file: str, class_name: str) -> str | None:
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}.") and name.rpartition(".")[2] == file and hasattr(module, class_name):
            return name
    return None


def _travels(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in PACKAGES


def _copy_source(module: str, folder: Path) -> list[str]:
    """Copies a module and what it imports of its own folder; returns their names, the module's first."""
    paths = [Path(str(import_module(module).__file__))]
    names = [paths[0].stem]
    while paths:
        path = paths.pop()
        source = _resolve(path)
        shutil.copyfile(source, folder / path.name)
        siblings = [name for name in sorted(get_relative_imports(source)) if name not in names]
        names += siblings
        paths += [path.with_name(f"{sibling}.py") for sibling in siblings]
    return names


def _resolve(path: Path) -> Path:
    """The file, or the one of a neighbouring folder that it stands for."""
    elsewhere = [name[1:] for name in get_relative_imports(path) if name.startswith(".")]
    return path.parent.parent.joinpath(*elsewhere[0].split(".")).with_suffix(".py") if elsewhere else path


def _entry_file(file: str, class_name: str, siblings: list[str]) -> str:
    lines = [
        "from typing import TYPE_CHECKING",
        "",
        f"from .{file} import {class_name}",
        "",
        "if TYPE_CHECKING:",
        *(f"    from .{sibling} import *  # noqa: F403" for sibling in siblings),
        "",
        f'__all__ = ["{class_name}"]',
    ]
    return HEADER + "\n".join(lines) + "\n"
