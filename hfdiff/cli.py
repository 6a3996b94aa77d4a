"""The `hfdiff` command. Each command is a file of `commands`, which imports what takes its time only when it runs."""

import argparse
import re
import sys
from collections.abc import Sequence

from .commands import average, bits_per_dim, convert, demo, evaluate, push, push_space, sample, sweep, train
from .data.process import is_first_process

COMMANDS = (demo, sample, evaluate, sweep, bits_per_dim, average, convert, push, push_space)
EXAMPLES = """examples:
  hfdiff demo
  hfdiff sample --class_labels 3 1 4
  hfdiff train ddpm --train_data_dir my_pictures --output_dir out/mine
  hfdiff evaluate --samples out/samples.npz --reference my_pictures --features classifier:hfdiff/mnist-judge
  hfdiff sweep --pipeline hfdiff/mnist-classifier-guided --guidance_scales 0 4 8 --num_images 100 \\
      --reference my_pictures --features classifier:hfdiff/mnist-judge
  hfdiff bits-per-dim --pipeline out/mine
  hfdiff convert guided-diffusion --unet 64x64_diffusion.pt --preset 64x64 --output out/imagenet-64
  hfdiff push out/mine user/mine
  hfdiff push-space spaces/classifier-guidance user/page

`hfdiff COMMAND --help` lists a command's flags.
"""


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line's parser, and those of the commands by name."""
    root = argparse.ArgumentParser(
        prog="hfdiff",
        description="Classic diffusion models for the Hugging Face ecosystem.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    commands.add_parser("train", help=f"train a model: {', '.join(train.KINDS)}", add_help=False)
    return root, commands.choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:
        train.main(arguments[1:])
        return 0
    root, commands = parser()
    args = root.parse_args(arguments)
    if args.command is None:
        root.print_help()
        return 0
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        if is_first_process() or isinstance(error, OSError):  # what all find, one tells
            message = name_flags(str(error), commands[args.command], arguments)
            print(f"hfdiff {args.command}: {message}", file=sys.stderr)
        return 2
    return 0


def name_flags(message: str, command: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """A message about arguments of functions, as one about the flags that were typed."""
    typed = {argument.partition("=")[0] for argument in arguments}
    for action in command._actions:
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        if flags:
            flag = next((flag for flag in flags if flag in typed), flags[0])
            message = re.sub(rf"`(--)?{re.escape(action.dest)}`", f"`{flag}`", message)
    return message
