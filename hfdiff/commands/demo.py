"""`hfdiff demo`: every class guided above the same noise unguided, and what an independent classifier sees in them."""

import argparse
import time
from pathlib import Path
from typing import Any

from ..sampling.settings import SamplingSettings
from .flags import GUIDED, JUDGE, check_output, check_path


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser("demo", help="draw every class, guided above unguided, and judge the images")
    command.set_defaults(run=run)
    command.add_argument("--pipeline", help="folder or Hub id; the bundled digits by default")
    command.add_argument(
        "--judge", help="folder or Hub id of a classifier of clean images; the bundled one of digits by default"
    )
    command.add_argument("--output", type=Path, default=Path("out/guided.png"), help="(default: %(default)s)")
    command.add_argument(
        "--num_inference_steps", "--steps", type=int, default=50, help="model calls per image (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, default=1, help="of the noise (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Draws, judges, and writes the picture.

    Raises:
        ValueError: for arguments out of their range, before anything is imported; models that do not fit.
    """
    SamplingSettings(1, num_inference_steps=args.num_inference_steps, seed=args.seed)
    check_path("pipeline", args.pipeline)
    check_path("judge", args.judge)
    check_output("output", args.output)

    import numpy as np

    from ..data.pictures import image_grid, to_pil
    from ..evaluation.accuracy import predicted_classes
    from ..evaluation.networks import load_features
    from ..pipelines.hub_download import bundled_source
    from ..sampling.opening import open_pipeline
    from ..sampling.sampler import Sampler

    judge = load_features(f"classifier:{args.judge or bundled_source(JUDGE)}")
    opened = open_pipeline(args.pipeline or bundled_source(GUIDED))
    count = opened.num_classes or 0
    if not opened.takes_classes or not count:
        raise ValueError(f"`pipeline` must have classes to ask for, got {args.pipeline!r}; try `hfdiff sample`.")
    start, rows = time.perf_counter(), []
    for scale in (None, 0.0):
        options = {"num_inference_steps": args.num_inference_steps, "seed": args.seed, "guidance_scale": scale}
        rows.append(Sampler(opened, SamplingSettings(count, **options)).draw_all(progress=True))
    seconds = time.perf_counter() - start
    args.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(to_pil(np.concatenate(rows)), columns=count, scale=3).save(args.output)
    names = [opened.id2label.get(label, str(label)) for label in range(count)]
    print(f"{args.output}: {2 * count} images in {seconds:.1f} s; asked for {' '.join(names)}")
    for kind, row in zip(("guided", "unguided"), rows):
        seen = predicted_classes(judge, row)
        right = sum(label == index for index, label in enumerate(seen))
        shown = " ".join(opened.id2label.get(label, str(label)) for label in seen)
        print(f"{kind:>8}: an independent classifier sees {shown}, {right} of {count} as asked")
