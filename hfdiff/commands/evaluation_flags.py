"""The flags that `hfdiff evaluate` and `hfdiff sweep` share, and the settings they make."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..evaluation.metric_set import EvaluationSettings
from ..sampling.settings import LABEL_POLICIES, SamplingSettings

EVALUATION_HELP = {
    "batch_size": "images per call of the network",
    "is_split_size": "images of each split of the Inception Score; splits are of consecutive images",
    "kid_subset_size": "images of each of KID's subsets, at most",
    "kid_num_subsets": "how many subsets",
    "nearest": "the neighbour k of precision and recall",
    "seed": "of drawn images, and of the subsets of kid and fid_infinity",
}
SAMPLING_FLAGS = [field.name for field in fields(SamplingSettings) if field.name != "seed"]  # both settings have it


def add_measuring_flags(command: Any) -> None:
    """Adds what says how images are measured."""
    command.add_argument(
        "--features", required=True, help='"inception", or "classifier:" and a folder or Hub id of an image classifier'
    )
    command.add_argument("--weights", type=Path, help="file of Inception's weights; downloaded by default")
    command.add_argument("--split", default="train", help="of datasets that have some")
    for setting in fields(EvaluationSettings):
        text = EVALUATION_HELP[setting.name]
        command.add_argument(f"--{setting.name}", type=int, default=setting.default, help=text)


def add_sampling_flags(command: Any) -> None:
    """Adds what says how many images are drawn, and of what classes."""
    command.add_argument("--num_images", type=int, help="how many")
    command.add_argument("--label_policy", help=f"the classes: {', '.join(LABEL_POLICIES)}; balanced by default")
    command.add_argument(
        "--class_labels", nargs="+", help="names or indices to be drawn in turn, with the policy given"
    )
    command.add_argument("--sampling_batch_size", type=int, help="images drawn together, 50 by default")


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
        raise ValueError("`--num_images` must say how many images to draw, got none.")
    given = {name: value for name, value in _given(args).items() if not isinstance(value, list)}
    labels = args.class_labels and tuple(args.class_labels)
    return SamplingSettings(**given, class_labels=labels, seed=args.seed)


def refuse_sampling_flags(args: argparse.Namespace) -> None:
    """Refuses flags of drawing where the samples are there already.

    Raises:
        ValueError: for the first of them.
    """
    for name, value in _given(args, "samples_dir").items():
        raise ValueError(f"`--{name}` is for samples drawn from a pipeline, got {value} for {args.samples!r}.")


def _given(args: argparse.Namespace, *others: str) -> dict[str, Any]:
    values = {name: getattr(args, name, None) for name in (*SAMPLING_FLAGS, *others)}
    return {name: value for name, value in values.items() if value is not None}
