"""The model card of a trained folder, and its upload to the Hub.

A card says what was trained on what and how, what was measured and on how much, how to load it, and what it cannot do.
"""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..data.labelled import LabelledImages
from ..data.sources import DIGITS
from ..hub.repository import open_repository, push
from .config import RunSettings, as_json

PACKAGES = ("hfdiff", "torch", "diffusers", "accelerate", "datasets")
NAMES_SHOWN = 20  # classes that a card lists by name

CARD = """---
{metadata}
---
# {title}

```python
{usage}
```

## Data
{data}

## Numbers
{numbers}

## Recipe
Seed {seed}, {versions}. Given as `--config`, this recipe repeats the run:

```yaml
{recipe}
```

## Limits
It knows {count} images of {size}×{size} pixels and no others; nothing keeps it from repeating one it was trained on.
The numbers above are all that was measured.
"""


class Measurement(NamedTuple):
    """A number of a card and where it comes from.

    Args:
        name: what was measured, with its unit.
        value: the number.
        provenance: on how many images of what, by which features or classifier.
    """

    name: str
    value: float
    provenance: str


def write_card(
    folder: str | Path,
    *,
    title: str,
    settings: RunSettings,
    data: LabelledImages,
    numbers: Sequence[Measurement],
    usage: str,
    tags: Sequence[str] = (),
    pipeline_tag: str = "unconditional-image-generation",
) -> None:
    """Writes `README.md`, the model card of a trained folder.

    Args:
        folder: the trained model's or pipeline's.
        title: of the card.
        settings: of the run, shown in full.
        data: what it was trained on.
        numbers: what was measured.
        usage: Python code that loads the folder.
        tags: for the Hub, besides "diffusion".
        pipeline_tag: the task, by the Hub's name.
    """
    metadata = ModelCardData(
        library_name="hfdiff",
        pipeline_tag=pipeline_tag,
        tags=["diffusion", *tags],
        datasets=[settings.dataset] if _is_hub_id(settings.dataset) else None,
    )
    content = CARD.format(
        metadata=metadata.to_yaml(),
        title=title,
        usage=usage.strip(),
        data=_describe(data, settings.dataset),
        numbers=_table(numbers) if numbers else "None were measured.",
        seed=settings.seed,
        versions=", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]),
        recipe=to_recipe(settings).strip(),
        count=f"{len(data.images):,}",
        size=data.images.shape[-1],
    )
    ModelCard(content).save(Path(folder, "README.md"))


def to_recipe(settings: RunSettings) -> str:
    """All settings of a run as a YAML recipe."""
    return yaml.safe_dump(as_json(settings), sort_keys=False, allow_unicode=True)  # which knows no subclasses of int


def _is_hub_id(dataset: str) -> bool:
    return dataset != DIGITS and not Path(dataset).exists()


def _describe(data: LabelledImages, source: str) -> str:
    name = "scikit-learn's 8×8 digits" if source == DIGITS else f"`{source}`"
    count, channels, height, width = data.images.shape
    colours = "grey" if channels == 1 else "colour"
    text = f"{name}: {count:,} {colours} images of {height}×{width} pixels"
    if not data.label_names:
        return f"{text}, without labels."
    names = ", ".join(data.label_names[:NAMES_SHOWN])
    return f"{text} in {len(data.label_names)} classes: {names}{', …' if len(data.label_names) > NAMES_SHOWN else '.'}"


def _table(numbers: Sequence[Measurement]) -> str:
    rows = [f"| {number.name} | {number.value:.4g} | {number.provenance} |" for number in numbers]
    return "\n".join(["| measure | value | measured on |", "|---|---|---|", *rows])


# --- the Hub ---------------------------------------------------------------------------------------------------------


def find_repository(settings: RunSettings) -> str | None:
    """The Hub repository that a run is to be published to, which is made if need be; call it before the training.

    Args:
        settings: of the run; without a `hub_model_id` the repository has the output folder's name, under the user's.

    Returns:
        The repository's full id; None without `push_to_hub`.

    Raises:
        ValueError: when nobody is logged in, the token may not write, or the Hub refuses.
    """
    if not settings.push_to_hub:
        return None
    try:
        return open_repository(settings.hub_model_id or Path(settings.output_dir).resolve().name)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`push_to_hub` needs a Hub repository to write to, got hub_model_id={settings.hub_model_id!r}: {error} Or "
            "leave it out."
        ) from error


def publish(folder: str | Path, repository: str) -> None:
    """Uploads a trained folder with the code that opens it, without checkpoints and logs.

    Args:
        folder: of the model or pipeline, with its card.
        repository: from [`find_repository`].

    Raises:
        ConnectionError: when the Hub does not take it; the folder is as it was.
    """
    try:
        push(folder, repository, commit_message="Upload the trained model", picture=False)
    except (ValueError, OSError) as error:
        raise ConnectionError(
            f"The trained model is in {str(folder)!r}, but could not be uploaded to {repository!r}: {error} Try the "
            "same command again with `--resume_from_checkpoint latest`."
        ) from error
