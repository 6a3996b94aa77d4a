"""`hfdiff evaluate`: FID, Inception Score, KID, precision, recall and sFID of images, with their provenance."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..evaluation.evaluate import METRICS, EvaluationSettings, evaluate
from ..evaluation.feature_set import Reference, compute_statistics, open_reference
from ..evaluation.features import FeatureExtractor, load_features
from ..evaluation.report import check_report_path
from ..evaluation.sources import open_images
from ..evaluation.statistics import save_statistics

HELP = {
    "batch_size": "images per call of the network",
    "is_split_size": "images of each split of the Inception Score; splits are of consecutive images",
    "kid_subset_size": "images of each of KID's subsets, at most",
    "kid_num_subsets": "how many subsets",
    "nearest": "the neighbour k of precision and recall",
    "seed": "of the subsets of kid and fid_infinity",
}


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser(
        "evaluate", help="measure images against a reference: FID, IS, KID, precision, recall"
    )
    command.set_defaults(run=run)
    images = "a folder of images, an npz file with arr_0, a parquet file, a dataset's folder or Hub id"
    command.add_argument("--samples", help=f"the images to measure: {images}")
    command.add_argument("--reference", help=f"the real images: {images}; or an npz file of statistics (mu, sigma)")
    command.add_argument(
        "--features", required=True, help='"inception", or "classifier:" and a folder or Hub id of an image classifier'
    )
    command.add_argument("--weights", type=Path, help="file of Inception's weights; downloaded by default")
    command.add_argument("--metrics", default="fid,fid_infinity", help=f"some of {','.join(METRICS)}")
    command.add_argument("--split", default="train", help="of datasets that have some")
    command.add_argument("--output", type=Path, help="report.json or report.md")
    command.add_argument("--save_statistics", type=Path, help="keep the reference's statistics in this npz file")
    for setting in fields(EvaluationSettings):
        command.add_argument(f"--{setting.name}", type=int, default=setting.default, help=HELP[setting.name])


def run(args: argparse.Namespace) -> None:
    """Computes the metrics, prints them as a table, and writes the report.

    Raises:
        ValueError: for arguments that do not fit, images, statistics or a network that cannot be read.
    """
    settings = EvaluationSettings(
        **{setting.name: getattr(args, setting.name) for setting in fields(EvaluationSettings)}
    )
    _check_arguments(args)
    samples = open_images(args.samples, args.split) if args.samples else None
    reference = open_reference(args.reference, args.split) if args.reference else Reference()
    extractor = load_features(args.features, weights=args.weights)
    if args.save_statistics:
        reference = _save(reference, extractor, args.save_statistics, settings.batch_size)
    if samples is None:
        return
    report = evaluate(samples, reference, extractor, args.metrics.split(","), settings)
    if args.output:
        report.write(args.output)
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
