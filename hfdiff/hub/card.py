"""The model card of a published folder: what is missing in it is added, nothing in it is replaced.

A card says what the model is, how to open it with and without hfdiff, how it was made, what was measured, and its
limits.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

CARD = "README.md"
PICTURE = "samples.png"
METRICS = {"ccuracy": "accuracy", "Fréchet distance": "frechet_distance", "its per dimension": "bits_per_dimension"}
NEW_CARD = """---
library_name: hfdiff
---
# {title}

{parts}

## Numbers
None were measured.

## Recipe
How it was made was not recorded.

## Limits
It knows the images it was trained on and no others; nothing keeps it from repeating one.
"""
WITH_HFDIFF = """With hfdiff:

```python
from hfdiff import {name}

{call}
```
"""
WITHOUT_HFDIFF = """With diffusers alone, which then runs the code of this repository:

```python
from diffusers import DiffusionPipeline

{call}
```
"""


def complete_card(
    folder: Path, index: Mapping[str, Any], *, repo_id: str, source: str, ours: bool, license: str | None = None
) -> None:
    """Adds to the folder's card, or to a new one, what a card on the Hub should have.

    Args:
        folder: with the files as they will be published.
        index: the content of its `model_index.json`, or of `config.json` for a model alone.
        repo_id: by which it will be opened.
        source: name of the folder by which the card's code opens it so far.
        ours: whether the class that opens it is hfdiff's.
        license: its identifier on the Hub, where the card names none.
    """
    path = folder / CARD
    name = index["_class_name"][1] if isinstance(index["_class_name"], list) else index["_class_name"]
    card = ModelCard(path.read_text() if path.exists() else _new_card(name, index))
    _complete_metadata(card, name, license)
    text = re.sub(rf'from_pretrained\("[^"]*\b{re.escape(source)}/?"', f'from_pretrained("{repo_id}"', card.text)
    if name.endswith("Pipeline") and not ours:
        text = text.replace(f'("{repo_id}")', f'("{repo_id}", trust_remote_code=True)').replace("import hfdiff\n", "")
    if "![" not in text and folder.joinpath(PICTURE).exists():
        title, _, rest = text.lstrip().partition("\n")
        text = f"{title}\n\n![Samples]({PICTURE})\n{rest}"
    if usage := _usage(text, name, index, repo_id, ours):
        text = f"{text.rstrip()}\n\n## How to open it\n{usage}"
    card.text = text.lstrip()
    path.write_text(f"---\n{card.data.to_yaml()}\n---\n{card.text}")


def _new_card(name: str, index: Mapping[str, Any]) -> str:
    parts = [f"- `{part}`: {entry[1]}" for part, entry in index.items() if _is_part(part, entry)]
    return NEW_CARD.format(title=name, parts="\n".join(parts) or f"A {name}.")


def _is_part(name: str, entry: Any) -> bool:
    return isinstance(entry, list) and not name.startswith("_") and isinstance(entry[-1], str)


def _complete_metadata(card: ModelCard, name: str, license: str | None) -> None:
    data: Any = card.data
    data.library_name = data.library_name or "hfdiff"
    data.license = data.license or license
    if name.endswith("Pipeline"):
        data.pipeline_tag = data.pipeline_tag or "unconditional-image-generation"
    data.tags = list(dict.fromkeys([*(data.tags or []), "diffusion", f"diffusers:{name}"]))
    data.metrics = data.metrics or [metric for word, metric in METRICS.items() if word in card.text] or None


def _usage(text: str, name: str, index: Mapping[str, Any], repo_id: str, ours: bool) -> str:
    """What the text does not tell yet of how to open the folder."""
    sections = []
    call = '{variable} = {opener}.from_pretrained("{repo_id}"{trust})\n{use}'
    words = {"variable": "model", "repo_id": repo_id, "use": "output = model(sample, timestep)"}
    if name.endswith("Pipeline"):
        arguments = "class_labels=[0, 1]" if "classifier" in index else "batch_size=2"
        words |= {"variable": "pipe", "use": f"images = pipe({arguments}).images"}
    if ours and f"{name}.from_pretrained(" not in text:
        sections.append(WITH_HFDIFF.format(name=name, call=call.format(opener=name, trust="", **words)))
    if name.endswith("Pipeline") and "trust_remote_code" not in text:
        trusting = call.format(opener="DiffusionPipeline", trust=", trust_remote_code=True", **words)
        sections.append(WITHOUT_HFDIFF.format(call=trusting))
    return "\n".join(sections)
