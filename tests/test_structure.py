"""The rooms of the package: imports point one way, and what is published can be copied out of it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hfdiff"
ROOMS = ["schedulers", "models", "pipelines", "data", "sampling", "evaluation", "hub"]
ROOMS += ["training", "convert", "commands"]
BELOW = ("lazy",)  # files of the package itself that every room may use
PORTABLE = {
    "schedulers": (),
    "models": ("schedulers.gaussian", "schedulers.noise"),
    "pipelines": ("schedulers.gaussian", "schedulers.noise"),
}
# `push_to_hub` is a method of every pipeline of diffusers; with hfdiff installed, it publishes as hfdiff does. A
# dictionary of classifiers becomes one component where hfdiff is installed.
UPWARDS = [("pipelines.hub_mixin", "hub"), ("pipelines.components", "models.classifier_set")]
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """`hfdiff/data/files.py` is data.files."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, also inside of its functions, like data.files."""
    parts = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*parts[: len(parts) - node.level + 1], *(node.module or "").split("."))
            for name in node.names:
                module = PACKAGE.joinpath(*base, name.name)
                is_module = module.with_suffix(".py").exists() or module.is_dir()
                yield ".".join(part for part in (*base, *([name.name] if is_module else [])) if part)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            absolute = [name for name in names if name.startswith("hfdiff.")]
            assert not absolute, f"{path}: write {absolute} as a relative import"
        elif isinstance(node, ast.Constant) and str(node.value).startswith("hfdiff.") and " " not in node.value:
            yield node.value.removeprefix("hfdiff.")  # given to `import_module`


def test_every_folder_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_import_runs_upwards(path):
    room = module_name(path).partition(".")[0]
    if room not in ROOMS:  # cli.py and the like stand above all
        return
    for module in imports(path):
        other = module.partition(".")[0]
        allowed = other in BELOW or (module_name(path), module) in UPWARDS
        assert allowed or ROOMS.index(other) <= ROOMS.index(room), f"{path.name} imports {module}"


def test_no_circle():
    graph = {module_name(path): set(imports(path)) for path in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module in graph and module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in PORTABLE], ids=module_name)
def test_what_is_published_imports_its_own_folder_alone(path):
    """diffusers copies a file and the siblings it imports: no parent packages, nothing two levels deep."""
    room = path.parent.name
    for module in imports(path):
        allowed = module in PORTABLE[room] or (module_name(path), module) in UPWARDS
        assert allowed or module.partition(".")[0] == room, f"{path.name} imports {module}"
