"""Deploying a Space: its folder, this package and the pipelines it shows, in one commit, so that it needs no more."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, metadata_load

from ..data.files import new_folder
from ..pipelines.hub_download import bundled_folder, speaking
from .repository import open_repository, upload

CARD = "README.md"
ENTRIES = ("sdk", "sdk_version", "python_version", "app_file")  # that the card of a Gradio Space must have
PACKAGE = Path(__file__).parents[1]
NOT_DEPLOYED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "out", "bundled")


def export_space(folder: str | Path, destination: str | Path) -> Path:
    """Writes a Space as it is to be on the Hub: beside its own files, hfdiff and the pipelines that its card names.

    Args:
        folder: with app and card. Of the card's `models`, hfdiff's own go along.
        destination: a new or empty folder.

    Returns:
        The destination.

    Raises:
        ValueError: for a folder that is no Gradio Space, or a destination with files.
        OSError: when it cannot be written; there is then no destination.
    """
    folder, destination = Path(folder), Path(destination)
    card = _card(folder)
    with new_folder(destination) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True, ignore=NOT_DEPLOYED)
        shutil.copytree(PACKAGE, partial / PACKAGE.name, ignore=NOT_DEPLOYED)
        for model in card.get("models") or []:
            if bundled := bundled_folder(model):
                shutil.copytree(bundled, partial / "pipelines" / bundled.name, ignore=NOT_DEPLOYED)
    return destination


def push_space(
    folder: str | Path,
    repo_id: str,
    *,
    model: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Deploys a Space: [`export_space`] and an upload in one commit, the Space being made if need be.

    Args:
        folder: of the Space.
        repo_id: "user/name", or a name, under the user's own.
        model: a Hub id for its variable HFDIFF_MODEL, the pipeline it shows; default: its own default.
        token: default: that of `hf auth login`, or of HF_TOKEN.
        private: whether a new Space is.
        commit_message: default: what did it.

    Returns:
        The address of the commit.

    Raises:
        ValueError: for a folder that is no Gradio Space, before anything is sent.
        OSError: when the Hub does not take it.
    """
    sdk = _card(Path(folder))["sdk"]
    with tempfile.TemporaryDirectory() as parent:
        exported = export_space(folder, Path(parent, "space"))
        repo_id = open_repository(repo_id, token=token, private=private, space_sdk=sdk)
        if model is not None:
            with speaking(repo_id):
                HfApi(token=token).add_space_variable(repo_id, "HFDIFF_MODEL", model)
        return upload(exported, repo_id, token=token, commit_message=commit_message, repo_type="space")


def _card(folder: Path) -> dict[str, Any]:
    """The front matter of a Space's card."""
    card = (metadata_load(folder / CARD) or {}) if folder.joinpath(CARD).is_file() else {}
    missing = [name for name in ENTRIES if not card.get(name)]
    if missing or card["sdk"] != "gradio" or not folder.joinpath(card["app_file"]).is_file():
        raise ValueError(
            f"`folder` must be a Gradio Space, whose {CARD} has {', '.join(ENTRIES)} of a file there; got "
            f"{str(folder)!r}" + (f" without {', '.join(missing)}" if missing else "") + "; name spaces/NAME."
        )
    return card
