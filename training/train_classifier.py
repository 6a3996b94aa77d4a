"""Trains a classifier of noisy images (Dhariwal & Nichol 2021, section 4) to guide a diffusion model.

    accelerate launch training/train_classifier.py --diffusion_model runs/digits --output_dir runs/guided-digits

With `--diffusion_model` the whole guided pipeline is saved, otherwise the classifier alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from hfdiff.models.noisy_classifier import NoisyClassifier
from hfdiff.pipelines.guidance import log_likelihood
from hfdiff.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.config import TrainingSettings, parse_settings
from hfdiff.training.data import Batch, BatchStream, LabelledImages, load_images, make_generator
from hfdiff.training.loop import Loss, make_accelerator, train
from hfdiff.training.losses import classification_loss, guided_denoising_loss

LEVELS = ("num_train_timesteps", "beta_schedule")
NOISE_SCHEDULE = (*LEVELS, "beta_start", "beta_end", "trained_betas")
ARCHITECTURE = (
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_downsamples",
    "num_head_channels",
    "norm_num_groups",
    "pool",
)
EVALUATION_BATCH = 256


@dataclass(kw_only=True)
class ClassifierSettings(TrainingSettings):
    """Settings of a noisy classifier's training.

    Args:
        label_column: the dataset's column of labels.
        validation_data: a dataset, as dataset_name, whose split "test" the classifier is judged on at the end.
        shift_augmentation: move each image by up to this many pixels each way, over a background of -1.
        diffusion_model: the pipeline folder or Hub id of the diffusion model to guide; gives the noise levels.
        num_train_timesteps: T, where there is no diffusion_model; default 1000.
        beta_schedule: the noise levels, where there is no diffusion_model; default linear.
        classification_weight: weight of the cross entropy in the loss.
        guided_denoising_weight: weight of the guided denoising loss, which trains the classifier's gradient.
        init_classifier: the folder of a classifier to start from, of any architecture.
        model_channels: base width of a new classifier; this and the following default to NoisyClassifier's.
        channel_mult: width of each level in multiples of it; each level after the first halves height and width.
        num_res_blocks: residual blocks per level.
        attention_downsamples: downsampling factors (1, 2, 4, ...) with attention.
        num_head_channels: channels per attention head.
        norm_num_groups: groups of each group normalisation.
        pool: what turns the last map into class scores.
        dropout: dropout probability in residual blocks, for a classifier to start from, too.
    """

    label_column: str = "label"
    validation_data: str | None = None
    shift_augmentation: NonNegativeInt = 0
    diffusion_model: str | None = None
    num_train_timesteps: PositiveInt | None = None
    beta_schedule: str | None = None
    classification_weight: NonNegativeFloat = 1.0
    guided_denoising_weight: NonNegativeFloat = 0.0
    init_classifier: str | None = None
    model_channels: PositiveInt | None = None
    channel_mult: tuple[PositiveInt, ...] | None = None
    num_res_blocks: PositiveInt | None = None
    attention_downsamples: tuple[PositiveInt, ...] | None = None
    num_head_channels: PositiveInt | None = None
    norm_num_groups: PositiveInt | None = None
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] | None = None
    dropout: ClosedUnitInterval = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for source, names in (("diffusion_model", LEVELS), ("init_classifier", ARCHITECTURE)):
            if getattr(self, source) and (given := self.given(names)):
                raise ValueError(f"`{source}` already says {', '.join(given)}, got {given}; leave these out.")
        if self.guided_denoising_weight and not self.diffusion_model:
            raise ValueError(
                f"`guided_denoising_weight` needs a `diffusion_model`, got {self.guided_denoising_weight} and none; "
                "name its folder."
            )
        if not self.guided_denoising_weight and not self.classification_weight:
            raise ValueError("`classification_weight` or `guided_denoising_weight` must be positive, got 0 for both.")

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """The settings of these names that are not left to their defaults."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def load_diffusion_model(settings: ClassifierSettings) -> tuple[UNet2DModel | None, DDPMScheduler]:
    """The frozen UNet to guide, if any, and the noise levels."""
    if not settings.diffusion_model:
        return None, DDPMScheduler(**settings.given(LEVELS))
    unet = UNet2DModel.from_pretrained(settings.diffusion_model, subfolder="unet")
    return unet.requires_grad_(False), DDPMScheduler.from_pretrained(settings.diffusion_model, subfolder="scheduler")


def make_classifier(settings: ClassifierSettings, data: LabelledImages, scheduler: DDPMScheduler) -> NoisyClassifier:
    """A new classifier for the data, or the one to start from.

    Raises:
        ValueError: when the classifier to start from is for other images or classes.
    """
    _, channels, size, _ = data.images.shape
    images = {"in_channels": channels, "sample_size": size, "num_classes": len(data.label_names)}
    run = {
        "dropout": settings.dropout,
        "id2label": dict(enumerate(data.label_names)),
        "noise_schedule": {name: scheduler.config[name] for name in NOISE_SCHEDULE},
    }
    if not settings.init_classifier:
        return NoisyClassifier(**images, **run, **settings.given(ARCHITECTURE))
    classifier = NoisyClassifier.from_pretrained(settings.init_classifier, **run)
    theirs = {name: classifier.config[name] for name in images}
    if theirs != images:
        raise ValueError(f"`init_classifier` must be for the dataset's {images}, got {theirs}; start from another.")
    return classifier


@torch.no_grad()
def accuracy_by_timestep(
    classifier: NoisyClassifier, scheduler: DDPMScheduler, data: LabelledImages, seed: int
) -> list[dict[str, float]]:
    """Accuracy and cross entropy (nats) of a classifier on noisy images, at ten timesteps from 0 on."""
    rows = []
    for t in range(0, len(scheduler), max(1, len(scheduler) // 10)):
        generator = make_generator(seed, "validation", t)
        correct = nats = 0.0
        for x0, labels in zip(data.images.split(EVALUATION_BATCH), data.labels.split(EVALUATION_BATCH), strict=True):
            xt = scheduler.q_sample(x0, t, torch.randn(x0.shape, generator=generator))
            logits = classifier(xt.to(classifier.device), t).logits.cpu()
            correct += (logits.argmax(dim=-1) == labels).sum().item()
            nats -= log_likelihood(logits, labels).sum().item()
        count = len(data.labels)
        rows.append({"timestep": t, "accuracy": correct / count, "cross_entropy": nats / count})
    return rows


def load_validation_data(settings: ClassifierSettings, data: LabelledImages) -> LabelledImages | None:
    """The images to judge the classifier on, if any, in the size of those it learns from.

    Raises:
        ValueError: when they have other channels or classes.
    """
    if not settings.validation_data:
        return None
    size = data.images.shape[-1]
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    validation = load_images(settings.validation_data, "test", **columns, resolution=size)
    expected, came = ((d.images.shape[1], d.label_names) for d in (data, validation))
    if came != expected:
        raise ValueError(
            f"`validation_data` must have the channels and classes of the dataset, {expected}, got {came}; use its own "
            "test images."
        )
    return validation


def make_loss(settings: ClassifierSettings, unet: UNet2DModel | None, scheduler: DDPMScheduler) -> Loss:
    """The weighted sum of the two losses; one of weight 0 is not computed."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        terms = []
        if settings.classification_weight:
            terms.append(settings.classification_weight * classification_loss(model, scheduler, *batch))
        if settings.guided_denoising_weight:
            terms.append(settings.guided_denoising_weight * guided_denoising_loss(model, unet, scheduler, *batch))
        return torch.stack(terms).sum()

    return loss


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script with the given flags, or those of the process."""
    settings = parse_settings(ClassifierSettings, argv, __doc__ or "")
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    data = load_images(settings.dataset, **columns, resolution=settings.resolution)
    validation = load_validation_data(settings, data)
    unet, scheduler = load_diffusion_model(settings)
    accelerator = make_accelerator(settings)
    classifier = make_classifier(settings, data, scheduler)
    # The pipeline refuses a classifier that does not fit, so it is made before the training.
    trained = classifier if unet is None else ClassifierGuidedPipeline(unet, classifier, scheduler)
    if settings.guided_denoising_weight:
        unet.to(accelerator.device)
    batches = BatchStream(
        data, settings.train_batch_size, len(scheduler), settings.seed, shift=settings.shift_augmentation
    )
    train(settings, accelerator, classifier, batches, make_loss(settings, unet, scheduler))
    if accelerator.is_main_process:
        trained.save_pretrained(settings.output_dir)
        if validation:
            rows = accuracy_by_timestep(classifier, scheduler, validation, settings.seed)
            Path(settings.output_dir, "accuracy.json").write_text(json.dumps(rows, indent=2) + "\n")
            for row in rows:
                print("t = {timestep}: accuracy {accuracy:.3f}, cross entropy {cross_entropy:.3f}".format(**row))


if __name__ == "__main__":
    main()
