"""`hfdiff convert`: checkpoints of the original code as pipeline folders."""

import argparse
from pathlib import Path
from typing import Any

from ..convert.flags import DEFAULTS, IMPROVED_DEFAULTS, parse_flags
from ..convert.presets import PRESETS

DTYPES = ("float32", "float16", "bfloat16")


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser("convert", help="open checkpoints of the original code as pipelines")
    command.set_defaults(run=run)
    formats = command.add_subparsers(dest="format", required=True)
    for name in ("guided-diffusion", "improved-diffusion"):
        adm = formats.add_parser(name, help=f"of OpenAI's {name}")
        adm.add_argument("--unet", type=Path, required=True, help="the diffusion model's checkpoint, a .pt file")
        if name == "guided-diffusion":
            adm.add_argument("--classifier", type=Path, help="the noisy classifier's checkpoint")
            adm.add_argument("--class_names", nargs="+", help="names of its classes, or a text file with one a line")
        adm.add_argument(
            "--flags", help="the original's MODEL_FLAGS, CLASSIFIER_FLAGS and DIFFUSION_FLAGS, as its README has them"
        )
        known = [key for key, preset in PRESETS.items() if preset.improved == (name == "improved-diffusion")]
        adm.add_argument(
            "--preset", choices=known, metavar="NAME", help=f"flags of a published checkpoint: {', '.join(known)}"
        )
        adm.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    for name in ("ncsn", "ncsnv2"):
        ncsn = formats.add_parser(name, help=f"of ermongroup's {name}")
        ncsn.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pth of the training")
        ncsn.add_argument("--config", type=Path, required=True, help="its YAML file")
        ncsn.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    for form in formats.choices.values():
        form.add_argument("--output", type=Path, required=True, help="the pipeline's folder, new or empty")
        form.add_argument("--verify", action="store_true", help="open the folder again and compare the outputs")


def run(args: argparse.Namespace) -> None:
    """Writes the folder and prints what it holds.

    Raises:
        ValueError: for arguments or files that do not fit; nothing is written then.
    """
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"`--output` must be a new or an empty folder, got {str(args.output)!r}; name another.")
    lines = _convert_ncsn(args) if args.format in ("ncsn", "ncsnv2") else _convert_adm(args)
    print(*lines, sep="\n")
    print(f"{args.output}: a pipeline; `hfdiff sample --pipeline {args.output}`")


def _convert_ncsn(args: argparse.Namespace) -> list[str]:
    _need_files(checkpoint=args.checkpoint, config=args.config)
    from ..convert.folder import convert_ncsn

    version = 2 if args.format == "ncsnv2" else 1
    return convert_ncsn(args.checkpoint, args.config, args.output, version, ema=not args.raw, verify=args.verify)


def _convert_adm(args: argparse.Namespace) -> list[str]:
    if args.flags is None and args.preset is None:
        raise ValueError(
            "`--flags` or `--preset` is missing: the weights do not tell their number of attention heads. Try "
            f"`--preset {next(iter(PRESETS))}`, or paste the flags that the model was trained with."
        )
    improved = args.format == "improved-diffusion"
    preset = "" if args.preset is None else PRESETS[args.preset].flags
    flags = parse_flags(f"{preset} {args.flags or ''}", IMPROVED_DEFAULTS if improved else DEFAULTS)
    classifier = None if improved else args.classifier
    _need_files(unet=args.unet, **({} if classifier is None else {"classifier": classifier}))
    names = None if improved else _class_names(args.class_names)
    import torch

    from ..convert.folder import convert_guided_diffusion

    dtype = getattr(torch, args.dtype)
    return convert_guided_diffusion(
        args.unet, args.output, flags, classifier, dtype=dtype, class_names=names, verify=args.verify
    )


def _need_files(**paths: Path) -> None:
    for name, path in paths.items():
        if not path.is_file():
            raise ValueError(f"`--{name}` must be a file, got {str(path)!r}; check the path.")


def _class_names(given: list[str] | None) -> list[str] | None:
    """The names, or the lines of the file that is named."""
    if given is not None and len(given) == 1 and Path(given[0]).is_file():
        return Path(given[0]).read_text().splitlines()
    return given
