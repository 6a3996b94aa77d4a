"""What a training of a diffusion model leaves: the pipeline, its last grid and its card, on the Hub where asked for."""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from ..data.labelled import LabelledImages
from ..models.noisy_classifier import NoisyClassifier
from .card import Measurement, publish, write_card
from .checkpoints import placed
from .copying import COPIED, COPIES, HELD_OUT_SHARE, SHARE, take_weights_before_copies
from .monitor import grid_path
from .settings import MonitorSettings


def finish(
    settings: MonitorSettings,
    pipeline: DiffusionPipeline,
    data: LabelledImages,
    *,
    title: str,
    usage: str,
    tag: str,
    measures: Mapping[str, tuple[str, str]],
    repository: str | None,
) -> None:
    """Saves the pipeline, its last grid and its card, and publishes them where a repository is named.

    Args:
        settings: of the run.
        pipeline: what was trained.
        data: what it was trained on.
        title: of the card.
        usage: Python code that loads `{folder}`, to be filled in.
        tag: of the card, for the Hub.
        measures: for each number of the last validation its name and on what it was measured.
        repository: a Hub id, if any.
    """
    measured = take_weights_before_copies(pipeline.unet, Path(settings.output_dir))
    numbers = [Measurement(name, measured[key], where) for key, (name, where) in measures.items() if key in measured]
    with placed(settings.output_dir) as folder:
        pipeline.save_pretrained(folder)
        if settings.sample_images:
            shutil.copy(grid_path(Path(settings.output_dir), measured["step"]), folder / "samples.png")
        write_card(
            folder,
            title=title,
            settings=settings,
            data=data,
            numbers=numbers,
            usage=usage.format(folder=repository or settings.output_dir),
            tags=[tag],
        )
    if repository:
        publish(settings.output_dir, repository)
    tell_what_was_made(settings.output_dir, pipeline)


def tell_what_was_made(output_dir: str, made: DiffusionPipeline | NoisyClassifier) -> None:
    """A run's last line: what is in its folder, how large, and what to do with it next."""
    parts = made.components.values() if isinstance(made, DiffusionPipeline) else [made]
    size = sum(parameter.numel() for part in parts if isinstance(part, nn.Module) for parameter in part.parameters())
    if isinstance(made, NoisyClassifier):
        what, then = "a classifier of noisy images", "guide a diffusion model by `ClassifierGuidedPipeline`"
    else:
        classes = getattr(made, "id2label", {})
        label = f" --class_labels {shlex.quote(next(iter(classes.values())))}" if classes else ""
        what, then = "a pipeline", f"`hfdiff sample --pipeline {output_dir}{label}`"
    print(f"{output_dir}: {what}, {size / 1e6:.1f}M parameters; {then}")


def common_measures(
    settings: MonitorSettings, validation: LabelledImages | None, loss: str
) -> dict[str, tuple[str, str]]:
    """Name and provenance of what is measured of every diffusion model.

    Args:
        settings: of the run.
        validation: the held-out images, if any.
        loss: the name of the loss.
    """
    count = min(len(validation.images), settings.validation_images) if validation else 0
    return {
        "validation_loss": (f"{loss} loss of held-out images", f"{count} held-out images, each at one timestep"),
        "frechet_distance": (
            "Fréchet distance to the dataset",
            f"{settings.fid_images} drawn images, {settings.sample_steps} steps, features of {settings.fid_features}",
        ),
        SHARE: (COPIES[SHARE], f"{settings.sample_images} drawn images; {COPIED}"),
        HELD_OUT_SHARE: (COPIES[HELD_OUT_SHARE], f"{count} held-out images; {COPIED}"),
    }
