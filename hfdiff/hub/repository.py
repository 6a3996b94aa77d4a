"""Uploads to the Hub, each in one commit."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError

from ..pipelines.hub_download import speaking
from .card import CARD
from .folder import export, publishable_files


def open_repository(
    repo_id: str, *, token: str | bool | None = None, private: bool | None = None, space_sdk: str | None = None
) -> str:
    """Makes sure that a repository is there and may be written to; returns its full id.

    Args:
        repo_id: "user/name", or a name, under the user's own.
        token: default: that of `hf auth login`, or of HF_TOKEN.
        private: whether a new repository is.
        space_sdk: what a Space runs by, like "gradio"; None is a model's repository.

    Raises:
        ValueError: for something that is no Hub id.
        OSError: when nobody is logged in, the token may not write, or the Hub does not answer.
    """
    api = HfApi(token=token)
    with speaking(repo_id):
        user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(f"The token may only read, not write {repo_id!r}; make another and `hf auth login`.")
    with speaking(repo_id):
        name = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        kind = "model" if space_sdk is None else "space"
        return api.create_repo(name, private=private, exist_ok=True, repo_type=kind, space_sdk=space_sdk).repo_id


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
) -> str:
    """Uploads all files of a folder in one commit, which is on the Hub whole or not at all.

    Args:
        folder: from [`export`].
        repo_id: "user/name".
        token: default: that of `hf auth login`, or of HF_TOKEN.
        commit_message: default: what did it.
        create_pr: as a pull request.
        repo_type: "model" or "space".

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        OSError: when the Hub does not take it.
    """
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    files = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
    message = commit_message or "Upload with hfdiff"
    with speaking(repo_id):
        commit = HfApi(token=token).create_commit(
            repo_id, files, commit_message=message, create_pr=create_pr, repo_type=repo_type
        )
    return commit.pr_url or str(commit.commit_url)


def push(
    source: str | Path | DiffusionPipeline,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    **options: Any,
) -> str:
    """Publishes a pipeline or model: [`export`] and [`upload`], the repository being made if need be.

    A card in the folder, else the one that the repository has, is kept and completed.

    Args:
        source: a pipeline, or a folder.
        repo_id: "user/name", or a name, under the user's own.
        token: default: that of `hf auth login`, or of HF_TOKEN.
        private: whether a new repository is.
        commit_message: default: what did it.
        create_pr: as a pull request.
        options: `license`, `variant` and `picture` of [`export`].

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: for a source that cannot be published, before anything is sent.
        OSError: when the Hub does not take it; it then has what it had, and the same call goes on.
    """
    files = [] if isinstance(source, DiffusionPipeline) else publishable_files(Path(source))
    repo_id = open_repository(repo_id, token=token, private=private)
    with tempfile.TemporaryDirectory() as folder:
        card = None if CARD in files else _published_card(repo_id, token)
        exported = export(source, Path(folder, "export"), repo_id=repo_id, card=card, **options)
        return upload(exported, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)


def _published_card(repo_id: str, token: str | bool | None) -> str | None:
    with speaking(repo_id), suppress(EntryNotFoundError):
        return Path(HfApi(token=token).hf_hub_download(repo_id, CARD)).read_text()
    return None
