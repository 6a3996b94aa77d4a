"""Metrics over guidance scales, for several schedulers and numbers of steps: which scale to take.

FID falls and rises again as the scale grows, while accuracy and Inception Score go on and recall is lost (Dhariwal &
Nichol 2021, figure 4). Every point of a sweep has the same noise and classes, so they differ by the settings alone.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..data.files import place_file
from ..data.image_source import open_images
from ..data.process import on_main
from ..sampling.opening import OpenedPipeline
from ..sampling.sample_files import draw_samples
from ..sampling.sampler import Sampler
from ..sampling.settings import SamplingSettings
from .evaluate import Evaluator
from .report import Report, read_report, show_value
from .settings import COPIES

LOWER_IS_BETTER = ("fid", "fid_infinity", "kid", "sfid", *COPIES)
CURVE = ("scheduler", "num_inference_steps")  # what the points of one line of the plot share
SETTINGS = (*CURVE, "guidance_scale", "num_images")
REPORT_FILE = "report.json"
Row = dict[str, Any]


def sweep_points(
    base: SamplingSettings,
    guidance_scales: Sequence[float],
    num_inference_steps: Sequence[int | None] = (None,),
    schedulers: Sequence[str | None] = (None,),
) -> list[SamplingSettings]:
    """The settings of every combination, the scales of one scheduler and number of steps together.

    Args:
        base: what all have in common.
        guidance_scales: w; 0 is off.
        num_inference_steps: model calls per image; None is the pipeline's own number.
        schedulers: class names; None is the pipeline's own.

    Raises:
        ValueError: for a value out of its range, a list that is empty, or one that names a value twice.
    """
    lists = {"schedulers": schedulers, "num_inference_steps": num_inference_steps, "guidance_scales": guidance_scales}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"`{name}` must hold one or more different values, got {list(values)}.")
    return [
        replace(base, scheduler=scheduler, num_inference_steps=steps, guidance_scale=scale)
        for scheduler, steps, scale in product(schedulers, num_inference_steps, guidance_scales)
    ]


def sweep(
    opened: OpenedPipeline,
    points: Sequence[SamplingSettings],
    evaluator: Evaluator | None,
    folder: Path,
    accelerator: Accelerator,
) -> Iterator[Report]:
    """Draws and measures each point; what the folder holds of it already is not done again.

    All processes draw, the main process measures. Each point has a folder with its samples and `report.json`.

    Args:
        opened: the pipeline.
        points: from [`sweep_points`].
        evaluator: of every point; the main process needs one.
        folder: of the sweep, on a disk that the processes share.
        accelerator: from [`join_processes`].

    Yields:
        Each point's report.

    Raises:
        ValueError: for settings that the pipeline does not know, before anything is drawn; a folder of other samples.
    """
    samplers = [Sampler(opened, point) for point in points]
    if evaluator is not None:
        evaluator.check_labels(samplers[0].labels, opened.name)
    for sampler in samplers:
        place = folder / point_name(sampler.provenance)
        samples = draw_samples(sampler, place, accelerator)
        yield on_main(accelerator, partial(_measure, evaluator, samples, place / REPORT_FILE))


def point_name(provenance: dict[str, Any]) -> str:
    """The name of a point's folder."""
    scheduler = provenance["scheduler"].rpartition(".")[2].removesuffix("Scheduler")
    return f"{scheduler}-steps-{provenance['num_inference_steps']}-scale-{provenance['guidance_scale']:g}"


def _measure(evaluator: Evaluator | None, file: Path, path: Path) -> Report:
    """The report in `path`, made anew where it is not of these samples, reference, features, settings and metrics."""
    assert evaluator is not None
    samples = open_images(file)
    if path.exists():
        report = read_report(path)
        inputs = evaluator.inputs(samples)
        same = all(getattr(report, name) == value for name, value in inputs.items())
        if same and evaluator.metrics.keys() <= report.metrics.keys():
            return report
    report = evaluator(samples)
    report.write(path)
    return report


@dataclass(frozen=True)
class SweepTable:
    """The results of a sweep.

    Args:
        rows: a point each: its scheduler, steps, scale and number of images, then its metrics.
        metrics: their names; the first one says which point is best.
    """

    rows: list[Row]
    metrics: list[str]

    @classmethod
    def of(cls, reports: Sequence[Report], metrics: Sequence[str]) -> "SweepTable":
        """The table of some metrics of the points' reports."""
        rows = [
            {name: report.samples[name] for name in SETTINGS} | {name: report.metrics[name] for name in metrics}
            for report in reports
        ]
        return cls(rows, list(metrics))

    def curves(self) -> dict[tuple[str, int], list[Row]]:
        """The points of each scheduler and number of steps, by rising scale."""
        found: dict[tuple[str, int], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row["guidance_scale"]):
            found.setdefault((row["scheduler"], row["num_inference_steps"]), []).append(row)
        return {key: found[key] for key in dict.fromkeys((row[CURVE[0]], row[CURVE[1]]) for row in self.rows)}

    def best(self, rows: Sequence[Row] | None = None) -> Row:
        """The best of some points, or of all, by the first metric; at equal values the smallest scale."""
        metric = self.metrics[0]
        sign = 1 if metric in LOWER_IS_BETTER else -1

        def rank(row: Row) -> tuple[float, float]:
            value = row[metric]
            return (math.inf if value is None else sign * value, row["guidance_scale"])

        return min(rows or self.rows, key=rank)

    def best_lines(self) -> list[str]:
        """The best scale of each curve, in words."""
        metric, curves = self.metrics[0], self.curves()
        lines = []
        for (scheduler, steps), rows in curves.items():
            row = self.best(rows)
            overall = ", the best of all" if row is self.best() and len(curves) > 1 else ""
            found = f"{row['guidance_scale']:g}, {metric} {show_value(row[metric])}{overall}"
            lines.append(f"best guidance_scale of {scheduler}, {steps} steps: {found}")
        return lines

    def to_csv(self) -> str:
        """A line per point."""
        writer = csv.DictWriter(text := io.StringIO(), [*SETTINGS, *self.metrics], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A row per point, the best one in bold."""
        names = [*SETTINGS, *self.metrics]
        best = self.best()
        lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        for row in self.rows:
            cells = [str(row[name]) if isinstance(row[name], int | str) else show_value(row[name]) for name in names]
            lines.append(f"| {' | '.join(f'**{cell}**' if row is best else cell for cell in cells)} |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The points, the best one, and the best one of each curve."""
        best = {
            "metric": self.metrics[0],
            "point": self.best(),
            "of_each_curve": [*map(self.best, self.curves().values())],
        }
        return json.dumps({"best": best, "points": self.rows}, indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """Writes `sweep.csv`, `sweep.md` and `sweep.json`."""
        for suffix, content in (("csv", self.to_csv()), ("md", self.to_markdown()), ("json", self.to_json())):
            place_file(folder / f"sweep.{suffix}", content.encode())
