"""Pipelines of the Hub, in the cache of huggingface_hub: fetched, checked by their checksums, and opened as a folder.

huggingface_hub resumes what is cut off and never shows a half-written file, but compares lengths only. The Hub's list
of a commit's files, which it keeps, has git's checksum of each.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from diffusers.utils import logging
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .portable import INDEX, PACKAGE

logger = logging.get_logger(__name__)

SMALL_FILES = ("*.json", "*.txt", "*.model")  # configs and vocabularies
LARGE = 100 * 2**20  # bytes; the Hub takes no larger file but through a pointer
OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def bundled_folder(repo_id: str) -> Path | None:
    """The folder of a pipeline or model of hfdiff's own that came with the package, where it did."""
    owner, _, name = repo_id.partition("/")
    package = Path(__file__).parents[1]  # of a wheel; a clone has them beside it
    places = (package / "bundled", package.parent / "pipelines") if owner == PACKAGE else ()
    return next((place / name for place in places if name and (place / name).is_dir()), None)


def bundled_source(repo_id: str) -> str:
    """Where to open a default from without asking the Hub: the folder that came with the package, else the Hub's id."""
    return str(bundled_folder(repo_id) or repo_id)


def fetch(repo_id: str, *, revision: str | None = None, **options: Any) -> str:
    """The folder of a pipeline or a model of the Hub: [`download`], whose arguments it takes.

    What came with the package is opened from there where the Hub cannot be reached or does not have it.
    """
    try:
        return download(repo_id, revision=revision, **options)
    except OSError as error:
        folder = bundled_folder(repo_id) if revision is None else None
        if folder is None or isinstance(error, PermissionError):
            raise
        logger.warning("%s comes from the copy in the package: the Hub cannot be reached or does not have it.", repo_id)
        return str(folder)


def download(
    repo_id: str,
    *,
    index: str = INDEX,
    revision: str | None = None,
    variant: str | None = None,
    code: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> str:
    """Downloads a pipeline, unless the cache has it, and returns its folder in the cache.

    Of the weights only those of the variant are fetched. Without a network, or when the Hub does not answer, the cached
    commit of the revision is opened, if it is whole.

    Args:
        repo_id: "user/name".
        index: the file that it must have, which says what it is.
        revision: branch, tag or commit; default: "main".
        variant: of the weights, like "fp16"; components without it have their plain weights fetched.
        code: fetch the repository's code as well, which nothing here runs.
        cache_dir: default: huggingface_hub's.
        token: default: that of `hf auth login`, or of HF_TOKEN; False sends none.
        local_files_only: ask nothing of the Hub.
        force_download: fetch again what the cache has.

    Raises:
        ValueError: for something that is no Hub id, or a variant that is not there.
        OSError: when the pipeline cannot be had, in one sentence: a `PermissionError`, `FileNotFoundError` or
            `ConnectionError`.
    """
    options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "force_download": force_download}
    with speaking(repo_id, revision):
        problem = None if local_files_only else _ask(repo_id, revision, token)
    options["local_files_only"] = local_files_only or problem is not None
    small = [*SMALL_FILES, *(["*.py"] if code else [])]
    with speaking(repo_id, revision, problem):
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=small, **options))
        tree = get_cached_repo_tree(repo_id, revision=folder.name, cache_dir=cache_dir)
    checksums = {file.path: file.blob_id for file in tree}
    if index not in checksums:
        kind = "pipeline" if index == INDEX else "model"
        raise FileNotFoundError(f"The Hub's repository {repo_id!r} holds no {kind}: it has no {index}.")
    weights = _choose_weights(checksums, variant)
    options["revision"] = folder.name
    with speaking(repo_id, revision, problem):
        snapshot_download(repo_id, allow_patterns=weights, **options)
    _check(repo_id, folder, checksums, options)
    return str(folder)


def _ask(repo_id: str, revision: str | None, token: str | bool | None) -> Exception | None:
    """Asks for the repository, as huggingface_hub does, but not without end; returns why the cache must do."""
    if re.fullmatch("[0-9a-f]{40}", revision or ""):  # a commit, which does not change
        return None
    try:
        HfApi(token=token).model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HFValidationError, RevisionNotFoundError):
        raise
    except (HTTPError, ConnectionError, json.JSONDecodeError) as error:
        return error
    return None


def _choose_weights(names: Iterable[str], variant: str | None) -> list[str]:
    """The weights of a variant, as safetensors where a component has them."""
    try:
        usable, _ = variant_compatible_siblings(list(names), variant=variant)
    except ValueError as error:
        raise ValueError(
            f"`variant` must be one that the repository has, got {variant!r}; leave it out for the plain weights."
        ) from error
    safe = {os.path.dirname(name) for name in usable if name.endswith(".safetensors")}
    return sorted(name for name in usable if name.endswith(".safetensors") or os.path.dirname(name) not in safe)


# --- checksums -------------------------------------------------------------------------------------------------------


def _check(repo_id: str, folder: Path, checksums: dict[str, str], options: dict[str, Any]) -> None:
    """Fetches files again whose content is not what their checksum says, once.

    Raises:
        OSError: when the second time is no better; the files are then no longer in the cache.
    """
    broken = _broken(folder, checksums)
    if broken and not options["local_files_only"]:
        with speaking(repo_id):
            snapshot_download(repo_id, allow_patterns=broken, **{**options, "force_download": True})
        broken = _broken(folder, checksums)
        for name in broken:
            folder.joinpath(name).resolve().unlink()
            folder.joinpath(name).unlink(missing_ok=True)
    if broken:
        raise OSError(
            f"The file {broken[0]!r} of {repo_id!r} is damaged: its content is not what its checksum says; load it "
            "again with a network."
        )


def _broken(folder: Path, checksums: dict[str, str]) -> list[str]:
    paths = {name: folder / name for name in checksums}
    return [name for name, path in paths.items() if path.is_file() and not _is_whole(path, checksums[name])]


def _is_whole(path: Path, checksum: str) -> bool:
    """Whether git would give a file this checksum: as it is, or as the pointer that stands for a large one."""
    with path.open("rb") as file:
        sha256 = sha_fileobj(file).hex()
    size = path.stat().st_size
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return checksum == git_hash(pointer.encode()) or (size < LARGE and checksum == git_hash(path.read_bytes()))


# --- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def speaking(repo_id: str, revision: str | None = None, problem: Exception | None = None) -> Iterator[None]:
    """Makes the client's errors, which have no base class of their own, one sentence: [`hub_error`].

    Args:
        repo_id: the repository.
        revision: of it, where one was asked for.
        problem: what kept the client from the Hub, so that it looked into the cache alone.
    """
    try:
        yield
    except Exception as error:
        raise hub_error(problem or error, repo_id, revision) from error


def hub_error(error: Exception, repo_id: str, revision: str | None = None) -> Exception:
    """What went wrong between here and the Hub, as one sentence that says what to do.

    Args:
        error: of huggingface_hub, or of the HTTP client below it.
        repo_id: the repository.
        revision: of it, where one was asked for.

    Returns:
        A `ValueError` for something that is no Hub id, otherwise an `OSError`; errors of the disk as they are.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    causes = list(_causes(error))
    status = next((cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)), 0)

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(HFValidationError):
        return ValueError(f'{repo_id!r} is neither a folder nor a Hub id like "user/name".')
    if caused_by(LocalTokenNotFoundError):
        return PermissionError(f"A token is needed for {repo_id!r}, but nobody is logged in; `hf auth login`.")
    if caused_by(GatedRepoError):
        return PermissionError(f"{repo_id!r} is gated: ask for access on its page of the Hub, then `hf auth login`.")
    if caused_by(RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id!r} has no revision {revision!r}; give a branch, a tag or a commit of it.")
    if caused_by(RepositoryNotFoundError):
        return FileNotFoundError(
            f"There is no folder and no repository of the Hub named {repo_id!r}, or it is private; check the name, or "
            "log in with `hf auth login` as somebody who may read it."
        )
    if caused_by(RemoteEntryNotFoundError):
        return FileNotFoundError(f"A file of {repo_id!r} is not on the Hub: {_in_one_line(error)}.")
    if status in (401, 403):
        return PermissionError(
            f"The Hub refuses the token for {repo_id!r} ({status}); make one with the rights it needs, then "
            "`hf auth login`."
        )
    return _connection_error(error, causes, status, repo_id)


def _connection_error(error: BaseException, causes: list[BaseException], status: int, repo_id: str) -> OSError:
    """The errors that may be gone a minute later."""
    if status == 429:
        return ConnectionError(f"The Hub has had too many requests from here (429), now for {repo_id!r}; wait a while.")
    if status >= 500:
        return ConnectionError(f"The Hub is out of order ({status}), asked for {repo_id!r}; try again later.")
    if any("Timeout" in type(cause).__name__ for cause in causes):
        return ConnectionError(f"The Hub takes too long to answer about {repo_id!r}; try again later.")
    if any(isinstance(cause, json.JSONDecodeError) for cause in causes):
        return ConnectionError(
            f"The answer about {repo_id!r} is not the Hub's; a proxy or a login page may be between."
        )
    if status == 404:
        return ConnectionError(f"A file of {repo_id!r} is not where the Hub says it is (404); try again later.")
    if any(isinstance(cause, HTTPError) and not isinstance(cause, HfHubHTTPError) for cause in causes):
        return ConnectionError(
            f"The connection to the Hub at {constants.ENDPOINT} failed, asked for {repo_id!r}: "
            f"{_in_one_line(causes[-1])}; try again later."
        )
    offline = (LocalEntryNotFoundError, CachedRepoTreeNotFoundError, OfflineModeIsEnabled)
    if any(isinstance(cause, offline) for cause in causes):
        return FileNotFoundError(
            f"{repo_id!r} is not whole in the cache and may not be fetched; load it with a network."
        )
    return ConnectionError(f"The Hub and {repo_id!r}: {_in_one_line(error)}.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
