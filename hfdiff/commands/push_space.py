"""`hfdiff push-space`: deploys a Space, or writes it as it would be on the Hub."""

import argparse
from pathlib import Path
from typing import Any

from .flags import check_path


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser("push-space", help="deploy a Space on the Hub")
    command.set_defaults(run=run)
    command.add_argument("folder", type=Path, help="of the Space, like spaces/classifier-guidance")
    command.add_argument("repo_id", help="user/name; a name alone is taken to be under your own")
    command.add_argument("--model", help="Hub id of the pipeline that it shows; its own default otherwise")
    command.add_argument("--private", action="store_true", default=None, help="of a Space that is new")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--output", type=Path, help="write the Space here and send nothing")


def run(args: argparse.Namespace) -> None:
    """Exports the Space and uploads it.

    Raises:
        ValueError: for a folder that is no Space.
        OSError: when the Hub does not take it.
    """
    check_path("folder", str(args.folder))

    from ..hub.space import export_space, push_space

    if args.output is not None:
        export_space(args.folder, args.output)
        print(f"{args.output}: what would be sent to {args.repo_id}; without `--output` it is sent")
        return
    options = {"model": args.model, "private": args.private, "commit_message": args.message}
    print(f"{push_space(args.folder, args.repo_id, **options)}: the Space is deployed")
