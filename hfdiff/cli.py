"""The `hfdiff` command: `sample` draws from a pipeline, `demo` shows the bundled one; `commands` holds the others."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .commands import bits_per_dim, convert, evaluate, push, push_space, sweep
from .data.pictures import image_grid, to_bytes, to_pil
from .data.process import is_first_process
from .models.noisy_classifier import NoisyClassifier
from .pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from .pipelines.pipeline_ncsn import NCSNPipeline
from .sampling.opening import open_pipeline, scheduler_class
from .sampling.sampler import class_indices

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BATCH_SIZE = 100


def draw(
    pipe: ClassifierGuidedPipeline, labels: Sequence[int | str], seed: int, scale: float | None, steps: int
) -> np.ndarray:
    """One image per label, (N, H, W, C) uint8; image i has its own generator, so it is the same in any batch."""

    def draw_rows(rows: range, **options: Any) -> Any:
        return pipe(labels[rows.start : rows.stop], guidance_scale=scale, num_inference_steps=steps, **options)

    return _draw_batches(draw_rows, len(labels), seed)


def draw_unlabelled(pipe: NCSNPipeline, count: int, seed: int, steps: int) -> np.ndarray:
    """Images of a pipeline without classes, as [`draw`] gives them."""
    return _draw_batches(lambda rows, **options: pipe(len(rows), steps, **options), count, seed)


def _draw_batches(draw_rows: Callable[..., Any], count: int, seed: int) -> np.ndarray:
    batches = []
    for start in range(0, count, BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, count))
        generators = [torch.Generator().manual_seed(seed + row) for row in rows]
        batches.append(to_bytes(draw_rows(rows, generator=generators, output_type="np")[0]))
    return np.concatenate(batches)


def save(images: np.ndarray, labels: Sequence[int | str] | None, output: Path, columns: int) -> None:
    """Writes images, and labels where there are some, as an npz file, a grid, or a folder, by the output's suffix.

    The npz file has the images in arr_0 and the labels in arr_1, the folder one file for each image.
    """
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


def sample(args: argparse.Namespace) -> None:
    """Draws `num` images, of each label where the pipeline has classes, and writes them."""
    if args.num < 1:
        raise ValueError(f"`--num` must be at least 1, got {args.num}.")
    pipe = open_pipeline(args.pipeline).pipe
    pipe.set_progress_bar_config(disable=False)
    if args.scheduler is not None:
        pipe.scheduler = scheduler_class(args.scheduler).from_config(pipe.scheduler.config)
    labelled = isinstance(pipe, ClassifierGuidedPipeline)
    if labelled != bool(args.labels) or (args.scale is not None and not labelled):
        raise ValueError(
            f"`--labels` and `--scale` are for pipelines with a classifier, which need labels, got {args.labels} and "
            f"{args.scale} for a {type(pipe).__name__}; {'name some' if labelled else 'leave them out'}."
        )
    if not labelled:
        images = draw_unlabelled(pipe, args.num, args.seed, args.steps)
        save(images, None, args.output, columns=math.ceil(len(images) ** 0.5))
        print(f"{len(images)} images: {args.output}")
        return
    labels = [label for label in class_indices(args.labels, pipe.classifier.id2label) for _ in range(args.num)]
    images = draw(pipe, labels, args.seed, args.scale, args.steps)
    save(images, labels, args.output, columns=args.num if args.num > 1 else len(labels))
    print(f"{len(images)} images: {args.output}")


def demo(args: argparse.Namespace) -> None:
    """Draws each class guided above unguided from the same noise, and asks an independent classifier what it sees."""
    pipe = ClassifierGuidedPipeline.from_pretrained(args.pipeline)
    judge = NoisyClassifier.from_pretrained(args.judge)
    labels = list(pipe.classifier.id2label)
    start = time.perf_counter()
    rows = [draw(pipe, labels, args.seed, scale, args.steps) for scale in (None, 0.0)]
    seconds = time.perf_counter() - start
    pictures = to_pil(np.concatenate(rows))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(pictures, columns=len(labels), scale=3).save(args.output)
    print(f"{args.output}: {2 * len(labels)} images in {seconds:.1f} s; asked for {' '.join(map(str, labels))}")
    for name, row in zip(("guided", "unguided"), rows):
        seen = judge_labels(judge, row)
        right = sum(a == b for a, b in zip(seen, labels))
        print(
            f"{name:>8}: an independent classifier sees {' '.join(map(str, seen))}, {right} of {len(labels)} as asked"
        )


@torch.no_grad()
def judge_labels(judge: NoisyClassifier, images: np.ndarray) -> list[int]:
    """The class a classifier sees in each clean image of (N, H, W, C) uint8."""
    x0 = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    return judge(x0, 0).logits.argmax(dim=-1).tolist()


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    root = argparse.ArgumentParser(
        prog="hfdiff", description="Classic diffusion models for the Hugging Face ecosystem."
    )
    commands = root.add_subparsers(dest="command", required=True)

    command = commands.add_parser("sample", help="draw images of the classes asked for")
    command.set_defaults(run=sample)
    command.add_argument("--pipeline", default="hfdiff/mnist-classifier-guided", help="folder or Hub id")
    command.add_argument("--labels", nargs="+", help="class names or indices, for a pipeline with a classifier")
    command.add_argument("--scale", type=float, help="guidance scale; the pipeline's own by default, 0 is off")
    command.add_argument(
        "--scheduler", help="a scheduler of diffusers, like DDIM, or AnnealedLangevin; the pipeline's own by default"
    )
    command.add_argument("--num", type=int, default=1, help="images, of each label where there are some")
    command.add_argument(
        "--output", type=Path, default=Path("out/samples.png"), help="grid.png, samples.npz or a folder"
    )

    show = commands.add_parser("demo", help="draw every class, guided above unguided, and judge the images")
    show.set_defaults(run=demo)
    show.add_argument("--pipeline", default="pipelines/mnist-classifier-guided", help="folder or Hub id")
    show.add_argument(
        "--judge", default="pipelines/mnist-judge", help="folder or Hub id of a classifier of clean images"
    )
    show.add_argument("--output", type=Path, default=Path("out/guided.png"), help="where the picture goes")

    for subparser, seed in ((command, 0), (show, 100)):
        subparser.add_argument("--steps", type=int, default=50, help="model calls per image")
        subparser.add_argument("--seed", type=int, default=seed, help="seed of the first image; the next has the next")

    bits_per_dim.add_parser(commands)
    evaluate.add_parser(commands)
    sweep.add_parser(commands)
    convert.add_parser(commands)
    push.add_parser(commands)
    push_space.add_parser(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        if is_first_process() or isinstance(error, OSError):  # what all find, one tells
            print(f"hfdiff {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
