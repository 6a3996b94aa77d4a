"""Publishing: a folder that anyone can open, with hfdiff or without, and its upload to the Hub in one commit."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

import hfdiff

from ..data.files import PARTIAL, new_folder
from ..data.pictures import image_grid, to_pil
from ..pipelines.portable import INDEX, add_code, use_imported
from ..sampling.opening import OpenedPipeline
from ..sampling.sampler import Sampler
from ..sampling.settings import SamplingSettings
from .card import CARD, PICTURE, complete_card

CONFIG = "config.json"
NOT_PUBLISHED = [
    "checkpoint-*",
    "averages/*",
    "before-copies.safetensors",
    "diffusion/*",  # of `hfdiff train guided`
    "logs/*",
    "*.jsonl",
    f"*{PARTIAL}*",
    ".git/*",
    ".cache/*",
]  # `*` also matches slashes
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
            for name in publishable_files(Path(source)):
                partial.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(source, name), partial / name)
        if card is not None and not partial.joinpath(CARD).exists():
            partial.joinpath(CARD).write_text(card)
        _finish(source, partial, repo_id or str(destination), license, variant, picture)
    return destination


def publishable_files(source: Path) -> list[str]:
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


def draw_picture(pipe: DiffusionPipeline) -> Image.Image:
    """A row of the first images of seed 0, of one class each where the pipeline has classes."""
    opened = OpenedPipeline(pipe)
    count = min(PICTURED, opened.num_classes or PICTURED)
    pictures = to_pil(Sampler(opened, SamplingSettings(count)).draw_all())
    return image_grid(pictures, columns=count, scale=max(1, 84 // pictures[0].width))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# --- the Hub ---------------------------------------------------------------------------------------------------------
