"""Draws docs/emoji.png: `python docs/emoji.py`, in a clone."""

from pathlib import Path

import torch

from hfdiff import ClassifierGuidedPipeline
from hfdiff.training.samples import save_grid

STYLES, ROWS = ("google", "twitter"), 2


def main() -> None:
    """Rows of the ten kinds in each style, of seed 0, at the pipeline's own scales and steps."""
    pipe = ClassifierGuidedPipeline.from_pretrained("hfdiff/emoji-classifier-guided")
    kinds = list(pipe.id2label.values())
    labels = {
        "kind": kinds * ROWS * len(STYLES),
        "style": [style for style in STYLES for _ in range(ROWS * len(kinds))],
    }
    images = pipe(labels, generator=torch.Generator().manual_seed(0), output_type="pt").images
    save_grid((images * 255).round().byte(), Path(__file__).with_suffix(".png"), len(kinds))


if __name__ == "__main__":
    main()
