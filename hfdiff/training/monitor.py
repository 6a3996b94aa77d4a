"""What is measured of a diffusion model while it trains: loss, variational bound, Fréchet distance and samples."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor

from ..data.files import PARTIAL, replace
from ..data.labelled import LabelledImages
from ..evaluation.bits_per_dim import bits_per_dim, spread_timesteps
from ..evaluation.metrics import frechet_distance
from ..evaluation.statistics import FeatureStatistics, RunningStatistics, load_statistics, save_statistics
from ..models.noisy_classifier import NoisyClassifier
from ..schedulers.scheduling_ddpm import DDPMScheduler
from .batches import make_generator
from .colour import ColourDrift
from .copying import CopyWatch, keep_weights
from .loop import Monitor
from .samples import save_grid
from .settings import MonitorSettings
from .unet import UNet

BATCH_SIZE = 256
BOUND_TERMS = 40  # of the chain's, for speed; the others are interpolated
REAL_IMAGES = 10_000  # at most, for the statistics of real images
CLEAN = 0  # the timestep of images without noise
STATISTICS = "real-statistics.npz"

Losses = Callable[[ModelMixin, Tensor, Tensor, Tensor, Tensor | None], Tensor]
Draw = Callable[[int], Tensor]


def make_monitor(
    settings: MonitorSettings,
    accelerator: Accelerator,
    model: ModelMixin,
    num_train_timesteps: int,
    losses: Losses,
    draw: Draw,
    data: LabelledImages,
    validation: LabelledImages | None,
    bound: Callable[[], float] | None = None,
) -> Monitor:
    """The monitor of a training; the main process measures, with the same noise every time.

    Args:
        settings: of the run.
        accelerator: of the run.
        model: the model.
        num_train_timesteps: its noise levels.
        losses: maps the model, x_0, t, ε and labels to a loss per image, (B,).
        draw: draws so many images, the same whenever it is asked, bytes (N, C, H, W).
        data: the images it trains on.
        validation: held-out images, if any.
        bound: the variational bound of held-out images in bits per dimension, where the model has one.

    Raises:
        ValueError: when the classifier for the Fréchet distance is not there, or for other images.
    """
    held_out = validation.spread(settings.validation_images) if validation else None
    classifier = load_features(settings.fid_features, data).to(accelerator.device) if settings.fid_features else None
    folder = Path(settings.output_dir)
    copies = CopyWatch(data, held_out)
    drift = ColourDrift(data, drawn_classes(settings, data), settings.prediction_type)

    @cache
    def real(classifier: NoisyClassifier) -> FeatureStatistics:
        return real_statistics(classifier, data, f"{settings.fid_features} of {settings.dataset}", folder)

    def monitor(step: int) -> dict[str, float]:
        numbers: dict[str, float] = {}
        if not accelerator.is_main_process:
            return numbers
        if held_out:
            numbers["validation_loss"] = validation_loss(model, losses, num_train_timesteps, held_out, settings.seed)
        if bound:
            numbers["bits_per_dim"] = bound()
        if classifier:
            fake = clean_statistics(classifier, draw(settings.fid_images).float() / 127.5 - 1)
            kept = real(classifier)
            numbers["frechet_distance"] = frechet_distance(fake.mean, fake.covariance, kept.mean, kept.covariance)
        if settings.sample_images:
            images = draw(settings.sample_images)
            save_grid(images, grid_path(folder, step))
            numbers |= (away := drift.measure(images))
            drift.warn(away, len(images), again=step == settings.max_train_steps)
            numbers |= (copied := copies.measure(images))
            keep_weights(model, folder, step, copied)
        return numbers

    return monitor


def drawn_classes(settings: MonitorSettings, data: LabelledImages) -> Tensor | None:
    """The classes of a grid's images, in their shares; None where they come as in the data.

    A model that is told classes draws them in turn; one that is trained on balanced classes draws them alike.
    """
    if getattr(settings, "class_conditional", False):
        return torch.arange(settings.sample_images) % len(data.label_names)
    if getattr(settings, "balance_classes", False):
        assert data.labels is not None
        return data.labels.unique()
    return None


def grid_path(folder: Path, step: int) -> Path:
    """Where the grid drawn after a training step is, in a run's folder."""
    return folder / "samples" / f"step-{step}.png"


def validation_loss(
    model: ModelMixin, losses: Losses, num_train_timesteps: int, data: LabelledImages, seed: int
) -> float:
    """The mean loss of images, each at one timestep; the timesteps are spread evenly over the chain."""
    count = len(data.images)
    generator = make_generator(seed, "validation", 0)
    timesteps = torch.linspace(0, num_train_timesteps - 1, count).round().long()
    timesteps = timesteps[torch.randperm(count, generator=generator)]
    total = 0.0
    for rows in torch.arange(count).split(BATCH_SIZE):
        x0 = data.images[rows]
        noise = torch.randn(x0.shape, generator=generator)
        labels = None if data.labels is None else data.labels[rows].to(model.device)
        x0, timestep, noise = (tensor.to(model.device) for tensor in (x0, timesteps[rows], noise))
        total += losses(model, x0, timestep, noise, labels).sum().item()
    return total / count


def held_out_bound(unet: UNet, scheduler: DDPMScheduler, data: LabelledImages, seed: int) -> float:
    """Bits per dimension of images, from a part of the bound's terms."""
    return bits_per_dim(
        unet,
        scheduler,
        data.images[:],
        generator=make_generator(seed, "bound", 0),
        timesteps=spread_timesteps(scheduler, BOUND_TERMS),
        class_labels=data.labels,
    ).total.item()


# --- the Fréchet distance --------------------------------------------------------------------------------------------


def load_features(folder: str, data: LabelledImages) -> NoisyClassifier:
    """A classifier whose features measure images like those of a dataset.

    Raises:
        ValueError: when it is not there, or for other images.
    """
    try:
        classifier = NoisyClassifier.from_pretrained(folder, dtype=torch.float32).eval()
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`fid_features` must be the folder of a NoisyClassifier, got {folder!r}: {reason}") from error
    expected = {"in_channels": data.images.shape[1], "sample_size": data.images.shape[2]}
    came = {name: classifier.config[name] for name in expected}
    if came != expected:
        raise ValueError(f"`fid_features` must be for the dataset's {expected}, got {came}; name another classifier.")
    return classifier


@torch.no_grad()
def clean_statistics(classifier: NoisyClassifier, images: Tensor) -> FeatureStatistics:
    """The statistics of a classifier's features of clean images in [-1, 1], (N, C, H, W)."""
    running = RunningStatistics()
    for part in images.split(BATCH_SIZE):
        running.update(classifier.features(part.to(classifier.device), CLEAN).cpu())
    return running.finish()


def real_statistics(classifier: NoisyClassifier, data: LabelledImages, source: str, folder: Path) -> FeatureStatistics:
    """The statistics of 10,000 images of a dataset, computed once and kept in `real-statistics.npz`.

    Args:
        classifier: whose features.
        data: the dataset.
        source: the names of both; statistics kept of other ones are computed anew.
        folder: of the run.
    """
    images = data.spread(REAL_IMAGES).images
    path, provenance = folder / STATISTICS, {"source": source, "shape": list(images.shape)}
    if path.exists() and (kept := load_statistics(path)).features == provenance:
        return kept.pooled
    statistics = clean_statistics(classifier, images)
    partial = path.with_name(f"{path.stem}{PARTIAL}.npz")
    save_statistics(partial, statistics, features=provenance)
    replace(partial, path)
    return statistics
