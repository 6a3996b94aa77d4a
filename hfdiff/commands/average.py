"""`hfdiff average`: a training's average of the weights, of a length chosen afterwards."""

import argparse
from pathlib import Path
from typing import Any

from .flags import check_output, check_path


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser("average", help="average a training's weights over a length chosen afterwards")
    command.set_defaults(run=run)
    command.add_argument("run_folder", type=Path, help="of a training with `--average_snapshots`")
    command.add_argument(
        "--sigma_rel", type=float, required=True, help="the average's width as a share of the training, like 0.08"
    )
    command.add_argument("--output", dest="destination", type=Path, required=True, help="a new folder")


def run(args: argparse.Namespace) -> None:
    """Writes the pipeline or model of the run with other weights.

    Raises:
        ValueError: for a run without such averages, a folder with files, or a length that they do not make.
    """
    check_path("run_folder", str(args.run_folder))
    check_output("destination", args.destination)

    from ..training.averaging import average_run

    error, count = average_run(args.run_folder, args.sigma_rel, args.destination)
    print(f"{args.destination}: σ_rel {args.sigma_rel:g} from {count} averages, whose profile is {error:.1%} off")
