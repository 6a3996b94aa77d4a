"""Trains pipelines/emoji-classifier-guided: a diffusion model of emoji and two classifiers that guide it.

    python training/train_emoji.py --data emoji-train.parquet --output_dir out/emoji

The parquet file has columns image, label (the kind) and style. Stages that are done are left, one that was stopped goes
on. On a GPU, batches are larger and steps fewer, of as many images.
"""

import argparse
from pathlib import Path

import torch
import yaml

from hfdiff import ClassifierGuidedPipeline, DDPMScheduler, NoisyClassifier, cli
from hfdiff.training.diffusion_model import open_diffusion_model
from hfdiff.training.unet import without_classes

RECIPES = Path(__file__).parent / "recipes"
STEPS = {"ddpm": 7000, "kind": 3000, "style": 1500}
LABELS = {"kind": "label", "style": "style"}
MIRRORED = yaml.safe_load((RECIPES / "emoji-ddpm.yaml").read_text())["random_flip_classes"]
AUGMENTED = {"kind": ["--augment_probability", "0.5", "--random_flip_classes", str(MIRRORED)], "style": []}
SCALES = {"kind": 14, "style": 20}
GPU_BATCH, BATCH = 256, 64
INDEX = "model_index.json"


def train(kind: str, recipe: str, folder: Path, steps: int, *flags: str) -> None:
    """A stage by `hfdiff train`, unless it is done."""
    if (folder / INDEX).is_file():
        return
    batch = GPU_BATCH if torch.cuda.is_available() else BATCH
    sizes = ["--train_batch_size", str(batch), "--max_train_steps", str(steps * BATCH // batch)]
    resume = ["--resume_from_checkpoint", "latest", "--output_dir", str(folder)]
    cli.main(["train", kind, "--config", str(RECIPES / recipe), *sizes, *resume, *flags])


def without_kinds(taught: Path, folder: Path) -> None:
    """The unconditional pipeline of the class-conditional one, for the classifiers to guide."""
    model = open_diffusion_model(str(taught))
    ClassifierGuidedPipeline(without_classes(model.unet), None, model.scheduler).save_pretrained(folder)


def main() -> None:
    """All stages, and the pipeline of their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet file of emoji to train on")
    parser.add_argument("--validation_data", help="parquet file of other emoji, to measure the classifiers with")
    parser.add_argument("--output_dir", type=Path, default=Path("out/emoji"))
    args = parser.parse_args()
    out, data = args.output_dir, ["--dataset_name", args.data]
    train("ddpm", "emoji-ddpm.yaml", out / "ddpm", STEPS["ddpm"], *data)
    without_kinds(out / "ddpm", out / "unconditional")
    measured = ["--validation_data", args.validation_data] if args.validation_data else []
    for name, column in LABELS.items():
        flags = [*data, *measured, *AUGMENTED[name], "--label_column", column, "--guidance_scale", str(SCALES[name])]
        flags += ["--diffusion_model", str(out / "unconditional")]
        train("classifier", "emoji-classifier.yaml", out / name, STEPS[name], *flags)
    classifiers = {name: NoisyClassifier.from_pretrained(out / name, subfolder="classifier") for name in LABELS}
    unet = open_diffusion_model(str(out / "unconditional")).unet
    scheduler = DDPMScheduler.from_pretrained(out / "unconditional", subfolder="scheduler")
    pipe = ClassifierGuidedPipeline(unet, classifiers, scheduler)
    pipe.to(dtype=torch.float16).save_pretrained(out / "pipeline")
    print(f"{out / 'pipeline'}: draw from it by `hfdiff sample --pipeline {out / 'pipeline'}`")


if __name__ == "__main__":
    main()
