"""The flags that commands share: one vocabulary, diffusers' words; shorter ones of earlier versions are still read."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..evaluation.settings import COPIES, METRIC_NAMES, OF_PIXELS, EvaluationSettings
from ..sampling.settings import LABEL_POLICIES, SamplingSettings

GUIDED, JUDGE = "hfdiff/mnist-classifier-guided", "hfdiff/mnist-judge"  # bundled, and on the Hub
IMAGES = "a folder of images, an npz file with arr_0, a parquet file, a dataset's folder or Hub id"
SCHEDULER = "a scheduler of diffusers, like DDIM, or AnnealedLangevin; the pipeline's own by default"
EVALUATION_HELP = {
    "batch_size": "images per call of the network",
    "is_split_size": "images of each split of the Inception Score; splits are of consecutive images",
    "kid_subset_size": "images of each of KID's subsets, at most",
    "kid_num_subsets": "how many subsets",
    "nearest": "the neighbour k of precision and recall",
    "density_nearest": "the neighbour k of density and coverage",
    "copies_nearest": "how many neighbours set the scale of a copy's distance",
    "copies_threshold": "the ratio of distances up to which a sample is a copy; --held_out may lower it",
    "seed": "of drawn images, and of the subsets of kid and fid_infinity",
}
SAMPLING_FLAGS = [field.name for field in fields(SamplingSettings) if field.name != "seed"]  # both settings have it


def add_label_flag(command: Any) -> None:
    """Adds the classes to draw."""
    command.add_argument(
        "--class_labels", "--labels", nargs="+", metavar="LABEL", help="names or indices of classes, drawn in turn"
    )


def add_drawing_flags(command: Any) -> None:
    """Adds how an image is drawn."""
    command.add_argument(
        "--guidance_scale", "--scale", type=float, help="the pipeline's own by default; 0 switches guidance off"
    )
    command.add_argument(
        "--num_inference_steps", "--steps", type=int, help="model calls per image; the pipeline's own by default"
    )
    command.add_argument("--scheduler", help=SCHEDULER)


def add_set_flags(command: Any) -> None:
    """Adds how many images a set has, and of what classes."""
    command.add_argument("--num_images", "--num", type=int, help="how many to draw")
    command.add_argument("--label_policy", help=f"the classes: {', '.join(LABEL_POLICIES)}; balanced by default")
    add_label_flag(command)
    command.add_argument("--sampling_batch_size", type=int, help="images drawn together, 50 by default")


def add_measuring_flags(command: Any, metrics: str) -> None:
    """Adds what is measured, and how.

    Args:
        command: to add to.
        metrics: the default.
    """
    command.add_argument("--metrics", default=metrics, help=f"some of {','.join(METRIC_NAMES)} (default: %(default)s)")
    command.add_argument(
        "--features",
        help='"inception"; "classifier:", "dinov2:" or "clip:" and the folder or Hub id of one; or "pixels", which '
        "is the default for copies alone",
    )
    command.add_argument("--weights", type=Path, help="file of Inception's weights; downloaded by default")
    command.add_argument("--split", default="train", help="of datasets that have some (default: %(default)s)")
    for setting in fields(EvaluationSettings):
        text = f"{EVALUATION_HELP[setting.name]} (default: %(default)s)"
        kind = type(setting.default)
        command.add_argument(f"--{setting.name}", type=kind, default=setting.default, help=text)
    command.add_argument("--held_out", help=f"real images that were not trained on, for copies: {IMAGES}")
    command.add_argument("--held_out_split", default="test", help="of theirs (default: %(default)s)")


def check_measuring(args: argparse.Namespace) -> None:
    """Refuses features and held-out images that are not there or do not fit the metrics, before anything is imported.

    Raises:
        ValueError: then.
    """
    metrics = args.metrics.split(",")
    if args.features is None and not set(metrics) <= {*OF_PIXELS}:
        raise ValueError(f"`features` must name a network for {args.metrics}, got none; try --features inception.")
    check_path("features", (args.features or "").partition(":")[2] or None)
    check_path("held_out", args.held_out)
    if args.held_out is not None and not set(metrics) & {*COPIES}:
        raise ValueError(f"`held_out` is for {' and '.join(COPIES)}, got the metrics {args.metrics}.")


def evaluation_settings(args: argparse.Namespace) -> EvaluationSettings:
    """The settings of the metrics.

    Raises:
        ValueError: for a number out of its range.
    """
    return EvaluationSettings(**{field.name: getattr(args, field.name) for field in fields(EvaluationSettings)})


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """What to draw, from the flags that are single values.

    Raises:
        ValueError: for a value out of its range, or none for the number of images.
    """
    if args.num_images is None:
        raise ValueError("`num_images` must say how many images to draw, got none.")
    given = {name: value for name, value in given_flags(args).items() if not isinstance(value, list)}
    labels = args.class_labels and tuple(args.class_labels)
    return SamplingSettings(**given, class_labels=labels, seed=args.seed)


def given_flags(args: argparse.Namespace, names: Sequence[str] = SAMPLING_FLAGS) -> dict[str, Any]:
    """The flags of these names that were given."""
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def check_path(name: str, source: str | None) -> None:
    """Refuses a path where nothing is, before anything is imported; what may be a Hub id is for the Hub to tell.

    Args:
        name: of the flag.
        source: a path or a Hub id.

    Raises:
        ValueError: then.
    """
    if source is None or Path(source).exists() or source.startswith("hfdiff/"):  # its Hub ids, also in its clone
        return
    path = Path(source)
    may_be_hub_id = source.count("/") < 2 and not source.startswith((".", "/", "~")) and not path.suffix
    is_below_folder = len(path.parts) == 2 and (path.parent.is_dir() or path.parts[0] == "out")  # where we write
    if not may_be_hub_id or is_below_folder:
        raise ValueError(f"`{name}` must be there, got {source!r}: there is no such file or folder; check the path.")


def check_output(name: str, output: Path, suffixes: Sequence[str] | None = None) -> None:
    """Refuses a path that cannot be written, before anything is computed for it.

    Args:
        name: of the flag.
        output: of a file or folder.
        suffixes: those it may have, "" for a folder's; None for any.

    Raises:
        ValueError: then.
    """
    if suffixes is not None and output.suffix not in suffixes:
        named = ", ".join(suffix for suffix in suffixes if suffix)
        raise ValueError(f"`{name}` must be a folder or end in one of {named}, got {str(output)!r}.")
    above = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(above, os.W_OK) or (above != output and not above.is_dir()):
        raise ValueError(f"`{name}` must be where files can be written, got {str(output)!r}: {above} takes none.")
