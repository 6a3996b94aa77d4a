"""`hfdiff push`: publishes a folder on the Hub, or writes it as it would be there."""

import argparse
from pathlib import Path
from typing import Any

from .flags import check_path


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser("push", help="publish a pipeline or a model on the Hub")
    command.set_defaults(run=run)
    command.add_argument("folder", type=Path, help="of a pipeline or a model, from `save_pretrained` or a training")
    command.add_argument("repo_id", help="user/name; a name alone is taken to be under your own")
    command.add_argument("--private", action="store_true", default=None, help="of a repository that is new")
    command.add_argument("--license", help="its identifier on the Hub, like apache-2.0, where the card names none")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--create_pr", action="store_true", help="as a pull request")
    command.add_argument("--no_picture", dest="picture", action="store_false", help="draw none for a card without one")
    command.add_argument("--output", type=Path, help="write the folder here and send nothing")


def run(args: argparse.Namespace) -> None:
    """Exports the folder and uploads it.

    Raises:
        ValueError: for a folder that cannot be published.
        OSError: when the Hub does not take it.
    """
    check_path("folder", str(args.folder))

    from ..hub.folder import export
    from ..hub.repository import push

    options = {"license": args.license, "picture": args.picture}
    if args.output is not None:
        export(args.folder, args.output, repo_id=args.repo_id, **options)
        print(f"{args.output}: what would be sent to {args.repo_id}; without `--output` it is sent")
        return
    address = push(
        args.folder,
        args.repo_id,
        private=args.private,
        commit_message=args.message,
        create_pr=args.create_pr,
        **options,
    )
    print(f"{address}: {args.folder} is published")
