"""`hfdiff sample`: images of any pipeline, as a picture, an npz file or a folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sampling.settings import SamplingSettings
from .flags import GUIDED, add_drawing_flags, add_label_flag, check_output, check_path

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
USUAL_STEPS = 50
UNLABELLED = 16  # images of a pipeline without classes, where no number is given


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser("sample", help="draw images from a pipeline, of the classes asked for")
    command.set_defaults(run=run)
    command.add_argument("--pipeline", help="folder or Hub id; the bundled digits by default")
    add_label_flag(command)
    command.add_argument(
        "--num_images",
        "--num",
        type=int,
        help=f"images of each label, or in all without labels; one of each class by default, {UNLABELLED} without any",
    )
    add_drawing_flags(command)
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("out/samples.png"),
        help="grid.png, samples.npz or a folder (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Draws the images and writes them.

    Raises:
        ValueError: for arguments out of their range, before anything is imported; a pipeline or labels that do not fit.
    """
    settings = _settings(args)
    check_path("pipeline", args.pipeline)
    check_output("output", args.output, (*IMAGE_SUFFIXES, ".npz", ""))

    from ..pipelines.hub_download import bundled_source
    from ..sampling.opening import open_pipeline
    from ..sampling.sampler import Sampler

    opened = open_pipeline(args.pipeline or bundled_source(GUIDED), _best_device())
    if args.num_images is None and not args.class_labels:
        count = opened.num_classes if opened.takes_classes else UNLABELLED
        settings = SamplingSettings(**{**vars(settings), "num_images": count or 1})
    sampler = Sampler(opened, settings)
    images = sampler.draw_all(progress=True)
    labels = None if sampler.labels is None else sampler.labels.tolist()
    columns = args.num_images if args.class_labels and (args.num_images or 1) > 1 else _columns(len(images), labels)
    save(images, labels, args.output, columns)
    shown = "" if labels is None else f" of {', '.join(dict.fromkeys(_names(labels, opened.id2label)))}"
    print(f"{args.output}: {len(images)} image{'s' if len(images) > 1 else ''}{shown}")


def _settings(args: argparse.Namespace) -> SamplingSettings:
    """What to draw; the number of images is not final where it depends on the pipeline."""
    if args.num_images is not None and args.num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {args.num_images}.")
    labels = tuple(label for label in args.class_labels or () for _ in range(args.num_images or 1))
    return SamplingSettings(
        num_images=len(labels) or args.num_images or 1,
        class_labels=labels or None,
        guidance_scale=args.guidance_scale,
        num_inference_steps=USUAL_STEPS if args.num_inference_steps is None else args.num_inference_steps,
        scheduler=args.scheduler,
        seed=args.seed,
    )


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _columns(count: int, labels: Sequence[int] | None) -> int:
    return round(count**0.5) if labels is None or len({*labels}) < count else count


def _names(labels: Sequence[int], id2label: dict[int, str]) -> list[str]:
    return [id2label.get(label, str(label)) for label in labels]


def save(images: "np.ndarray", labels: Sequence[int] | None, output: Path, columns: int) -> None:
    """Writes images, and labels where there are some, as an npz file, a grid, or a folder, by the output's suffix.

    The npz file has the images in arr_0 and the labels in arr_1, the folder one file for each image.
    """
    import numpy as np

    from ..data.pictures import image_grid, to_pil

    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = to_pil(images)
    if output.suffix == ".npz":
        np.savez(output, images, *([] if labels is None else [np.asarray(labels)]))
    elif output.suffix in IMAGE_SUFFIXES:
        image_grid(pictures, columns).save(output)
    else:
        output.mkdir(exist_ok=True)
        for index, picture in enumerate(pictures):
            picture.save(output / f"{index:05d}{'' if labels is None else f'_{labels[index]}'}.png")
