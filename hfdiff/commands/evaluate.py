"""`hfdiff evaluate`: FID, Inception Score, KID, precision, recall, sFID and accuracy, with their provenance.

Of images that are there, or of a pipeline's, drawn on the spot; under `accelerate launch` all processes draw.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..data.image_source import open_images
from ..data.process import is_first_process
from ..evaluation.evaluate import Evaluator
from ..evaluation.feature_set import Reference, compute_statistics, open_reference
from ..evaluation.features import FeatureExtractor, load_features
from ..evaluation.metric_set import METRICS, EvaluationSettings
from ..evaluation.report import Report, check_report_path
from ..evaluation.statistics import save_statistics
from ..sampling.opening import INDEX, open_pipeline
from ..sampling.sample_files import default_folder, draw_samples, join_processes, only_main
from ..sampling.sampler import Sampler
from .evaluation_flags import (
    add_measuring_flags,
    add_sampling_flags,
    evaluation_settings,
    refuse_sampling_flags,
    sampling_settings,
)

IMAGES = "a folder of images, an npz file with arr_0, a parquet file, a dataset's folder or Hub id"


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser(
        "evaluate", help="measure images or a pipeline: FID, IS, KID, precision, recall, accuracy"
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--samples", help=f"the images to measure: {IMAGES}; or a pipeline's, with --num_images, to draw them"
    )
    command.add_argument("--reference", help=f"the real images: {IMAGES}; or an npz file of statistics (mu, sigma)")
    add_measuring_flags(command)
    command.add_argument("--metrics", default="fid,fid_infinity", help=f"some of {','.join(METRICS)}")
    command.add_argument("--output", type=Path, help="report.json or report.md")
    command.add_argument("--save_statistics", type=Path, help="keep the reference's statistics in this npz file")
    drawing = command.add_argument_group("to draw images from a pipeline")
    add_sampling_flags(drawing)
    drawing.add_argument("--guidance_scale", type=float, help="the pipeline's own by default, 0 is off")
    drawing.add_argument("--num_inference_steps", type=int, help="model calls per image; the pipeline's own by default")
    drawing.add_argument(
        "--scheduler", help="a scheduler of diffusers, like DDIM, or AnnealedLangevin; the pipeline's own by default"
    )
    drawing.add_argument("--samples_dir", type=Path, help="where the images go; a folder of out/samples by default")


def run(args: argparse.Namespace) -> None:
    """Computes the metrics, prints them as a table, and writes the report.

    Raises:
        ValueError: for arguments that do not fit, images, statistics or a network that cannot be read.
    """
    settings = evaluation_settings(args)
    _check_arguments(args)
    if _draws(args):
        _evaluate_pipeline(args, settings)
        return
    refuse_sampling_flags(args)
    if is_first_process():  # files are measured by one
        samples = open_images(args.samples, args.split) if args.samples else None
        evaluator = _open_evaluator(args, settings)
        if samples is not None:
            _tell(evaluator(samples), args.output)


def _draws(args: argparse.Namespace) -> bool:
    """Whether the samples are to be drawn: from a pipeline's folder, or a Hub id, if it is said how many."""
    if args.samples is None or Path(args.samples).exists():
        return args.samples is not None and Path(args.samples, INDEX).is_file()
    return args.num_images is not None


def _evaluate_pipeline(args: argparse.Namespace, settings: EvaluationSettings) -> None:
    sampling = sampling_settings(args)
    accelerator = join_processes()
    evaluator = only_main(accelerator, lambda: _open_evaluator(args, settings))
    sampler = Sampler(open_pipeline(args.samples, accelerator.device), sampling)
    if evaluator is not None:
        evaluator.check_labels(sampler.labels, args.samples)
    samples = draw_samples(sampler, args.samples_dir or default_folder(sampler), accelerator)
    if evaluator is not None:
        _tell(evaluator(open_images(samples)), args.output)


def _open_evaluator(args: argparse.Namespace, settings: EvaluationSettings) -> Evaluator:
    """Everything but the samples, so that what does not fit is found before any are drawn."""
    reference = open_reference(args.reference, args.split) if args.reference else Reference()
    extractor = load_features(args.features, weights=args.weights)
    if args.save_statistics:
        reference = _save(reference, extractor, args.save_statistics, settings.batch_size)
    return Evaluator(reference, extractor, args.metrics.split(","), settings)


def _tell(report: Report, output: Path | None) -> None:
    if output is not None:
        report.write(output)
    print(report.to_table())
    for text in report.warnings:
        print(f"warning: {text}", file=sys.stderr)


def _check_arguments(args: argparse.Namespace) -> None:
    if args.samples is None and args.save_statistics is None:
        raise ValueError("`--samples` must name the images to measure, got none.")
    if args.output is not None:
        check_report_path(args.output)
    if args.save_statistics is not None and (args.reference is None or args.save_statistics.suffix != ".npz"):
        raise ValueError(
            f"`--save_statistics` must be an npz file and needs the images of `--reference`, got "
            f"{str(args.save_statistics)!r} and {args.reference!r}."
        )


def _save(reference: Reference, extractor: FeatureExtractor, path: Path, batch_size: int) -> Reference:
    if reference.images is None or reference.statistics is not None:
        raise ValueError(
            "`--save_statistics` needs a `--reference` of images, got statistics, which are there already."
        )
    found = compute_statistics(reference.images, extractor, batch_size)
    save_statistics(path, found.pooled, found.spatial, found.features)
    print(f"statistics of {found.pooled.num_images} images: {path}")
    return reference._replace(statistics=found)
