"""`hfdiff evaluate`: FID, Inception Score, KID, precision, recall, copies and others, with their provenance.

Of images that are there, or of a pipeline's, drawn on the spot; under `accelerate launch` all processes draw.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.process import is_first_process
from ..evaluation.settings import COPIES, EvaluationSettings, check_metrics
from ..sampling.settings import SamplingSettings
from .flags import (
    IMAGES,
    SAMPLING_FLAGS,
    add_drawing_flags,
    add_measuring_flags,
    add_set_flags,
    check_measuring,
    check_output,
    check_path,
    evaluation_settings,
    given_flags,
    sampling_settings,
)

if TYPE_CHECKING:
    from ..data.image_source import ImageSource
    from ..evaluation.evaluate import Evaluator
    from ..evaluation.feature_set import Reference
    from ..evaluation.features import FeatureExtractor

INDEX = "model_index.json"  # of a pipeline's folder
SUFFIXES = (".json", ".md")  # of a report


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser(
        "evaluate", help="measure images or a pipeline: FID, IS, KID, precision, recall, copies, accuracy"
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--samples", help=f"the images to measure: {IMAGES}; or a pipeline's, with --num_images, to draw them"
    )
    command.add_argument("--reference", help=f"the real images: {IMAGES}; or an npz file of statistics (mu, sigma)")
    add_measuring_flags(command, metrics="fid,fid_infinity")
    command.add_argument("--output", type=Path, help="report.json or report.md")
    command.add_argument(
        "--neighbours", type=Path, help="for copies: a png file of the samples nearest to training images, beside them"
    )
    command.add_argument("--save_statistics", type=Path, help="keep the reference's statistics in this npz file")
    drawing = command.add_argument_group("to draw images from a pipeline")
    add_set_flags(drawing)
    add_drawing_flags(drawing)
    drawing.add_argument("--samples_dir", type=Path, help="where the images go; a folder of out/samples by default")


def run(args: argparse.Namespace) -> None:
    """Computes the metrics, prints them as a table, and writes the report.

    Raises:
        ValueError: for arguments that do not fit, before anything is imported; images, statistics or a network that
            cannot be read.
    """
    settings, sampling = _check_arguments(args)
    if sampling is not None:
        _evaluate_pipeline(args, settings, sampling)
    elif is_first_process():  # files are measured by one
        from ..data.image_source import open_images

        samples = open_images(args.samples, args.split) if args.samples else None
        evaluator = _open_evaluator(args, settings)
        if samples is not None:
            _measure(evaluator, samples, args)


def _check_arguments(args: argparse.Namespace) -> tuple[EvaluationSettings, SamplingSettings | None]:
    """How to measure, and what to draw, where the samples are to be drawn."""
    settings = evaluation_settings(args)
    sampling = sampling_settings(args) if _draws(args) else None
    if sampling is not None and sampling.num_images < 2:
        raise ValueError(f"`num_images` must be at least 2, which a covariance needs, got {sampling.num_images}.")
    if args.samples is None and args.save_statistics is None:
        raise ValueError("`samples` must name the images to measure, got none.")
    for name in ("samples", "reference"):
        check_path(name, getattr(args, name))
    check_measuring(args)
    if args.neighbours is not None:
        check_output("neighbours", args.neighbours)
        if args.neighbours.suffix != ".png" or not {*COPIES} & {*args.metrics.split(",")}:
            raise ValueError(
                f"`neighbours` must end in .png and needs --metrics {' or '.join(COPIES)}, got "
                f"{str(args.neighbours)!r} and {args.metrics}."
            )
    if args.output is not None:
        check_output("output", args.output)
    if args.samples is not None:
        check_metrics(args.metrics.split(","), args.reference is not None, args.features or "")
    if args.output is not None and args.output.suffix not in SUFFIXES:
        raise ValueError(f"`output` of a report must end in .json or .md, got {args.output.name!r}.")
    if args.save_statistics is not None and (args.reference is None or args.save_statistics.suffix != ".npz"):
        raise ValueError(
            f"`save_statistics` must be an npz file and needs the images of `reference`, got "
            f"{str(args.save_statistics)!r} and {args.reference!r}."
        )
    if sampling is None:
        for name, value in given_flags(args, (*SAMPLING_FLAGS, "samples_dir")).items():
            raise ValueError(f"`{name}` is for samples drawn from a pipeline, got {value} for {args.samples!r}.")
    return settings, sampling


def _draws(args: argparse.Namespace) -> bool:
    """Whether the samples are to be drawn: from a pipeline's folder, or a Hub id, if it is said how many."""
    if args.samples is None or Path(args.samples).exists():
        return args.samples is not None and Path(args.samples, INDEX).is_file()
    return args.num_images is not None


def _evaluate_pipeline(args: argparse.Namespace, settings: EvaluationSettings, sampling: SamplingSettings) -> None:
    from ..data.image_source import open_images
    from ..sampling.opening import open_pipeline
    from ..sampling.sample_files import default_folder, draw_samples, join_processes, only_main
    from ..sampling.sampler import Sampler

    accelerator = join_processes()
    evaluator = only_main(accelerator, lambda: _open_evaluator(args, settings))
    sampler = Sampler(open_pipeline(args.samples, accelerator.device), sampling)
    if evaluator is not None:
        evaluator.check_labels(sampler.labels, args.samples)
    samples = draw_samples(sampler, args.samples_dir or default_folder(sampler), accelerator)
    if evaluator is not None:
        _measure(evaluator, open_images(samples), args)


def _open_evaluator(args: argparse.Namespace, settings: EvaluationSettings) -> "Evaluator":
    """Everything but the samples, so that what does not fit is found before any are drawn."""
    from ..evaluation.evaluate import Evaluator
    from ..evaluation.feature_set import Reference, open_reference
    from ..evaluation.networks import load_features

    reference = Reference()
    if args.reference:
        reference = open_reference(args.reference, args.split, args.held_out, args.held_out_split)
    extractor = load_features(args.features or "pixels", weights=args.weights)
    if args.save_statistics:
        reference = _save(reference, extractor, args.save_statistics, settings.batch_size)
    return Evaluator(reference, extractor, args.metrics.split(","), settings)


def _measure(evaluator: "Evaluator", samples: "ImageSource", args: argparse.Namespace) -> None:
    """Writes the report and the picture, and tells the metrics."""
    report, neighbours = evaluator.measure(samples)
    if args.output is not None:
        report.write(args.output)
    print(report.to_table())
    for text in report.warnings:
        print(f"warning: {text}", file=sys.stderr)
    if args.output is not None:
        print(f"{args.output}: the report")
    if args.neighbours is not None:
        from ..data.files import place_file
        from ..evaluation.neighbours import plot_neighbours

        name, found = next(iter(neighbours.items()))
        assert evaluator.reference.images is not None
        picture = plot_neighbours(samples, evaluator.reference.images, found, report.beside[name]["threshold"])
        picture.savefig(image := io.BytesIO(), format="png")
        args.neighbours.parent.mkdir(parents=True, exist_ok=True)
        place_file(args.neighbours, image.getvalue())
        print(f"{args.neighbours}: the samples nearest to training images, by {name}")


def _save(reference: "Reference", extractor: "FeatureExtractor", path: Path, batch_size: int) -> "Reference":
    from ..evaluation.feature_set import compute_statistics
    from ..evaluation.statistics import save_statistics

    if reference.images is None or reference.statistics is not None:
        raise ValueError("`save_statistics` needs a `reference` of images, got statistics, which are there already.")
    found = compute_statistics(reference.images, extractor, batch_size)
    save_statistics(path, found.pooled, found.spatial, found.features)
    print(f"{path}: statistics of {found.pooled.num_images} images")
    return reference._replace(statistics=found)
