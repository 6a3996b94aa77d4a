"""Results that say what they are of: numbers with N, features, weights, settings and versions."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..data.files import place_file

PACKAGES = ("hfdiff", "torch", "diffusers", "transformers", "datasets", "numpy", "pillow", "torch-fidelity")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number may depend on, where they are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Args:
        metrics: value of each metric; None where it could not be estimated, which a warning explains.
        spread: standard deviation over splits or subsets, of those that have some.
        samples: source, number and shape of the generated images.
        reference: source and number of the real images, and whether they or cached statistics were used.
        features: name, weights, resize and width of what was compared.
        settings: of the metrics, with the seed.
        warnings: what makes a number hard to compare.
        versions: of the packages.
        beside: numbers that a metric is to be read with, like the share of held-out images that pass for copies.
    """

    metrics: dict[str, float | None]
    spread: dict[str, float]
    samples: dict[str, Any]
    reference: dict[str, Any]
    features: dict[str, Any]
    settings: dict[str, Any]
    warnings: list[str]
    versions: dict[str, str] = field(default_factory=package_versions)
    beside: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def to_table(self) -> str:
        """The metrics, a line each, for the terminal."""
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)

    def to_markdown(self) -> str:
        """Everything, as a table of metrics and one of what they are of."""
        lines = ["| metric | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in self._rows())]
        lines += ["", "| | |", "|---|---|"]
        for part in ("samples", "reference", "features", "settings", "versions"):
            entries = ", ".join(f"{key} {_show(value)}" for key, value in getattr(self, part).items())
            lines.append(f"| {part} | {entries} |")
        lines += ["", *(f"Note: {text}" for text in self.warnings)] if self.warnings else []
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path) -> None:
        """Writes JSON or Markdown, by the suffix.

        Raises:
            ValueError: for another suffix than .json or .md.
        """
        path = check_report_path(path)
        content = self.to_json() if path.suffix == ".json" else self.to_markdown()
        path.parent.mkdir(parents=True, exist_ok=True)
        place_file(path, content.encode())

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, value in self.metrics.items():
            spread = f" ± {self.spread[name]:.4g}" if name in self.spread else ""
            beside = ", ".join(f"{what} {show_value(number)}" for what, number in self.beside.get(name, {}).items())
            rows.append((name, f"{show_value(value, 6)}{spread}{beside and f' ({beside})'}"))
        return rows


def show_value(value: float | None, digits: int = 4) -> str:
    """A metric's value in words."""
    return "not estimated" if value is None else f"{value:.{digits}g}"


def read_report(path: str | Path) -> Report:
    """A report that was written as JSON.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        return Report(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} must be a report in JSON: {error}; remove it.") from error


def check_report_path(path: str | Path) -> Path:
    """The path of a report, if its suffix says how to write it.

    Raises:
        ValueError: for another suffix than .json or .md.
    """
    path = Path(path)
    if path.suffix not in (".json", ".md"):
        raise ValueError(f"`output` of a report must end in .json or .md, got {path.name!r}.")
    return path


def _show(value: Any) -> str:
    return "unknown" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
