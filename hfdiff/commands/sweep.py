"""`hfdiff sweep`: metrics of a pipeline over guidance scales, schedulers and numbers of steps, as table and plot."""

import argparse
import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.settings import COPIES, EvaluationSettings, check_metrics
from .flags import (
    IMAGES,
    add_measuring_flags,
    add_set_flags,
    check_measuring,
    check_output,
    check_path,
    evaluation_settings,
    sampling_settings,
)

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluator
    from ..evaluation.report import Report
    from ..evaluation.sweep import SweepTable

DEFAULT_METRICS = "fid,is,precision,recall,accuracy,worst_class_accuracy"
COLUMNS = 3  # panels side by side
TITLES = {"fid": "FID ↓", "fid_infinity": "FID∞ ↓", "sfid": "sFID ↓", "kid": "KID ↓", "is": "Inception Score ↑"}
TITLES |= {name: f"{name.replace('_', ' of ')} ↓" for name in COPIES}


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser("sweep", help="measure a guided pipeline over guidance scales, schedulers and steps")
    command.set_defaults(run=run)
    command.add_argument("--pipeline", required=True, help="folder or Hub id of the pipeline")
    command.add_argument(
        "--guidance_scales", "--scales", type=float, nargs="+", required=True, help="0 switches guidance off"
    )
    command.add_argument(
        "--num_inference_steps", "--steps", type=int, nargs="+", help="the pipeline's own number by default"
    )
    command.add_argument("--schedulers", nargs="+", help="of diffusers, like DDIM; the pipeline's own by default")
    command.add_argument("--reference", required=True, help=f"the real images: {IMAGES}; or an npz file of statistics")
    add_measuring_flags(command, metrics=DEFAULT_METRICS)
    add_set_flags(command)
    command.add_argument(
        "--output_dir",
        type=Path,
        default=Path("out/sweep"),
        help="for table, plot and samples; to resume a sweep, repeat the command (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Draws and measures every point, prints table and best scales, and writes them and the plot beside the samples.

    Raises:
        ValueError: for arguments that do not fit, before anything is imported; a reference, a network or a pipeline
            that cannot be read.
    """
    settings, base = evaluation_settings(args), sampling_settings(args)
    check_metrics(args.metrics.split(","), True, args.features or "")
    for name in ("pipeline", "reference"):
        check_path(name, getattr(args, name))
    check_measuring(args)
    check_output("output_dir", args.output_dir)

    from ..data.files import place_file
    from ..evaluation.sweep import SweepTable, sweep, sweep_points
    from ..sampling.opening import open_pipeline
    from ..sampling.sample_files import join_processes, only_main

    points = sweep_points(base, args.guidance_scales, args.num_inference_steps or (None,), args.schedulers or (None,))
    accelerator = join_processes()
    evaluator = only_main(accelerator, lambda: _open_evaluator(args, settings))
    opened = open_pipeline(args.pipeline, accelerator.device)
    reports: list[Report] = []
    for report in sweep(opened, points, evaluator, args.output_dir, accelerator):
        reports.append(report)
        if accelerator.is_main_process:
            print(f"{len(reports)} of {len(points)}: {_describe(report)}", file=sys.stderr, flush=True)
    if evaluator is not None:
        table = SweepTable.of(reports, [*evaluator.metrics])
        table.write(args.output_dir)
        image = io.BytesIO()
        plot(table, _caption(reports[0])).savefig(image, dpi=120, format="png")
        place_file(args.output_dir / "sweep.png", image.getvalue())
        for text in dict.fromkeys(text for report in reports for text in report.warnings):
            print(f"warning: {text}", file=sys.stderr)
        print(table.to_markdown(), *table.best_lines(), sep="\n")
        print(f"{args.output_dir}: sweep.md, .csv, .json and .png, and the samples of each point")


def _open_evaluator(args: argparse.Namespace, settings: EvaluationSettings) -> "Evaluator":
    from ..evaluation.evaluate import Evaluator
    from ..evaluation.feature_set import open_reference
    from ..evaluation.networks import load_features

    extractor = load_features(args.features or "pixels", weights=args.weights)
    reference = open_reference(args.reference, args.split, args.held_out, args.held_out_split)
    return Evaluator(reference, extractor, args.metrics.split(","), settings)


def _describe(report: "Report") -> str:
    from ..evaluation.report import show_value

    values = ", ".join(f"{name} {show_value(value)}" for name, value in report.metrics.items())
    return "{scheduler}, {num_inference_steps} steps, scale {guidance_scale:g}: ".format(**report.samples) + values


def _caption(report: "Report") -> str:
    """What was measured, for the top of the plot."""
    samples, reference = report.samples, report.reference
    real = reference.get("statistics", reference)
    source = Path(real["source"])
    return (
        f"{samples['pipeline']}: {samples['num_images']} images a point, {samples['label_policy']} classes, seed "
        f"{samples['seed']}\nfeatures of {report.features['name']}, reference {real['num_images']} images of "
        f"{source.name if source.exists() else source}"
    )


def plot(table: "SweepTable", caption: str) -> Any:
    """Each metric against the guidance scale, a line per scheduler and number of steps; the best point is circled."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(table.metrics))
    rows = math.ceil(len(table.metrics) / columns)
    figure = Figure(figsize=(3.6 * columns, 0.7 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    best, curves = table.best(), table.curves()
    scales = sorted({row["guidance_scale"] for row in table.rows})
    for panel, metric in zip(panels, table.metrics):
        for (scheduler, steps), points in curves.items():
            name = scheduler.rpartition(".")[2].removesuffix("Scheduler")
            line = [[point[key] for point in points] for key in ("guidance_scale", metric)]
            panel.plot(*line, ".-", label=f"{name}, {steps} steps")
        panel.plot(best["guidance_scale"], best[metric], "o", markersize=10, fillstyle="none", color="black")
        panel.set(title=TITLES.get(metric, f"{metric.replace('_', ' ')} ↑"), xlabel="guidance scale")
        panel.set_xscale("symlog", linthresh=min((scale for scale in scales if scale), default=1))
        panel.set_xticks(scales, [f"{scale:g}" for scale in scales])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels[len(table.metrics) :]:
        panel.remove()
    panels[0].legend(fontsize="small")
    figure.suptitle(caption, fontsize="small")
    return figure
