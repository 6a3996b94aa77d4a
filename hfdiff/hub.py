"""Publishing: a folder that anyone can open, with hfdiff or without, and its upload to the Hub in one commit."""

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

import hfdiff

from .card import CARD, PICTURE, complete_card
from .images import image_grid
from .pipelines.hub_download import speaking
from .pipelines.portable import INDEX, add_code, use_imported
from .training.files import PARTIAL, new_folder

CONFIG = "config.json"
NOT_PUBLISHED = ["checkpoint-*", "logs/*", "*.jsonl", f"*{PARTIAL}*", ".git/*", ".cache/*"]  # `*` also matches slashes
PICKLES = ["*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl"]
PICTURED = 10  # images


def export(
    source: str | Path | DiffusionPipeline,
    destination: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    variant: str | None = None,
    picture: bool = True,
    card: str | None = None,
) -> Path:
    """Writes a folder as it is to be on the Hub: safetensors, code, card and picture.

    A pipeline opens by its class of hfdiff, and with diffusers alone by `trust_remote_code=True`. The folder of a
    model alone carries no code.

    Args:
        source: a pipeline, the folder of one, or the folder of a model. Checkpoints, logs and pickles stay out.
        destination: a new or empty folder.
        repo_id: the name by which its card opens it; default: the destination.
        license: its identifier on the Hub, like "apache-2.0", where the card names none.
        variant: of the weights' file names, like "fp16", of a pipeline that is not yet saved.
        picture: draw one for a card that has none.
        card: text of the card to complete where the source has none.

    Returns:
        The destination.

    Raises:
        ValueError: for a destination with files, a source that holds no model, or one without safetensors.
        OSError: when it cannot be written; there is then no destination.
    """
    destination = Path(destination)
    with new_folder(destination) as partial:
        if isinstance(source, DiffusionPipeline):
            source.save_pretrained(partial, variant=variant)
        else:
            for name in _files(Path(source)):
                partial.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(source, name), partial / name)
        if card is not None and not partial.joinpath(CARD).exists():
            partial.joinpath(CARD).write_text(card)
        _finish(source, partial, repo_id or str(destination), license, variant, picture)
    return destination


def _files(source: Path) -> list[str]:
    """The names of what is to be published of a saved pipeline or model."""
    if not any(source.joinpath(name).is_file() for name in (INDEX, CONFIG)):
        raise ValueError(f"`source` must be a pipeline or its folder, got {str(source)!r} without {INDEX} or {CONFIG}.")
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    names = list(filter_repo_objects(names, ignore_patterns=[*NOT_PUBLISHED, *PICKLES]))
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"`source` must hold its weights as safetensors, got none in {str(source)!r}; save it again.")
    return names


def _finish(
    source: str | Path | DiffusionPipeline,
    folder: Path,
    repo_id: str,
    license: str | None,
    variant: str | None,
    picture: bool,
) -> None:
    """Adds code, picture and card, and takes the names of this machine's folders out of the configs."""
    for path in folder.rglob("*.json"):
        if "_name_or_path" in (config := _read(path)):
            _write(path, {name: value for name, value in config.items() if name != "_name_or_path"})
    main = folder / (INDEX if folder.joinpath(INDEX).exists() else CONFIG)
    index = use_imported(_read(main)) if main.name == INDEX else _read(main)
    class_name = str(index.get("_class_name"))
    kind = getattr(hfdiff, class_name, None)
    if kind is None and not hasattr(diffusers, class_name):
        raise ValueError(f"`source` must be saved by a class of hfdiff or diffusers, got {class_name} in {main.name}.")
    if main.name == INDEX:
        _write(main, index)
        add_code(folder, kind or getattr(diffusers, class_name))
        has_picture = folder.joinpath(PICTURE).exists() or "![" in _text(folder / CARD)
        if kind and picture and not has_picture:
            draw_picture(kind.from_pretrained(folder, variant=variant)).save(folder / PICTURE)
    name = "" if isinstance(source, DiffusionPipeline) else Path(source).resolve().name
    complete_card(folder, _read(main), repo_id=repo_id, source=name, ours=kind is not None, license=license)


def draw_picture(pipe: Any) -> Any:
    """A row of images, of one class each where the pipeline has classes, from fixed seeds."""
    classes = getattr(getattr(pipe, "classifier", None), "config", {}).get("num_classes")
    count = min(PICTURED, classes or PICTURED)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    images = pipe(list(range(count)) if classes else count, generator=generators).images
    return image_grid(images, columns=count, scale=max(1, 84 // images[0].width))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# --- the Hub ---------------------------------------------------------------------------------------------------------


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
    files = [] if isinstance(source, DiffusionPipeline) else _files(Path(source))
    repo_id = open_repository(repo_id, token=token, private=private)
    with tempfile.TemporaryDirectory() as folder:
        card = None if CARD in files else _published_card(repo_id, token)
        exported = export(source, Path(folder, "export"), repo_id=repo_id, card=card, **options)
        return upload(exported, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)


def _published_card(repo_id: str, token: str | bool | None) -> str | None:
    with speaking(repo_id), suppress(EntryNotFoundError):
        return Path(HfApi(token=token).hf_hub_download(repo_id, CARD)).read_text()
    return None
