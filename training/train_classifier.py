"""Trains a classifier of noisy images (Dhariwal & Nichol 2021, section 4) to guide a diffusion model.

    accelerate launch training/train_classifier.py
    accelerate launch training/train_classifier.py --diffusion_model runs/digits --output_dir runs/guided-digits

With `--diffusion_model` the whole guided pipeline is saved, otherwise the classifier alone. Without any flag the model
is the one that a bare `train_ddpm.py` leaves, where there is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from hfdiff.data.labelled import LabelledImages
from hfdiff.data.process import is_first_process, on_main, run_script
from hfdiff.data.sources import DIGITS, reading_model
from hfdiff.models.noisy_classifier import NoisyClassifier
from hfdiff.pipelines.inputs import has_noise_levels, most_steps
from hfdiff.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from hfdiff.training.augmentation import Augmentation
from hfdiff.training.batches import Batch, BatchStream, load_training_data
from hfdiff.training.card import find_repository, publish, write_card
from hfdiff.training.checkpoints import placed
from hfdiff.training.classifier_report import load_judge, make_monitor, report_noise_levels, report_samples
from hfdiff.training.config import TrainingSettings, parse_settings
from hfdiff.training.diffusion_model import Levels, make_levels, noise_schedule, open_diffusion_model
from hfdiff.training.loop import Loss, make_accelerator, train
from hfdiff.training.losses import classification_loss, guided_denoising_loss

BARE_DIFFUSION_MODEL = "out/digits-ddpm"
NO_MODEL = (
    f"No diffusion model in {BARE_DIFFUSION_MODEL}: the classifier is trained for the linear schedule and saved alone. "
    "Train one first, or name one with `--diffusion_model`."
)
LEVELS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
ARCHITECTURE = (
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_downsamples",
    "num_head_channels",
    "norm_num_groups",
    "pool",
)
SMALL = {"model_channels": 16, "num_head_channels": 16, "norm_num_groups": 8}
SAMPLING = {"guidance_scale", "sample_images", "sample_steps", "judge"}  # settings that do not reach the weights
USAGE = """from hfdiff import ClassifierGuidedPipeline

pipe = ClassifierGuidedPipeline.from_pretrained("{folder}")
image = pipe([{label!r}], num_inference_steps={steps}).images[0]"""
USAGE_ALONE = """from hfdiff import NoisyClassifier

classifier = NoisyClassifier.from_pretrained("{folder}")
names = classifier.id2label  # logits: classifier(noisy_images, timestep).logits"""


@dataclass(kw_only=True)
class ClassifierSettings(TrainingSettings):
    """Settings of a noisy classifier's training.

    Args:
        label_column: the dataset's column of labels.
        shift_augmentation: move each image by up to this many pixels each way; its border is repeated outwards.
        label_smoothing: share of each label that is spread evenly over all classes, in the cross entropy.
        diffusion_model: the pipeline folder or Hub id of the diffusion model or score network to guide; gives the noise
            levels. A run on the digits without any takes out/digits-ddpm where there is one.
        num_train_timesteps: T, where there is no diffusion_model; default 1000.
        beta_schedule: the noise levels, where there is no diffusion_model; default linear.
        beta_start: of those levels, their first β.
        beta_end: of those levels, their last β.
        classification_weight: weight of the cross entropy in the loss.
        guided_denoising_weight: weight of the guided denoising loss, which trains the classifier's gradient.
        guidance_scale: the pipeline's default, also that of the samples drawn at the end.
        sample_images: images of each class drawn for `samples.png` at the end; 0 draws none.
        sample_steps: model calls per drawn image.
        judge: the folder of another classifier, of clean images, that says which classes those samples show.
        init_classifier: the folder of a classifier to start from, of any architecture.
        model_channels: base width of a new classifier, default 16, with num_head_channels 16 and norm_num_groups 8; the
            following default to NoisyClassifier's.
        channel_mult: width of each level in multiples of it; each level after the first halves height and width.
        num_res_blocks: residual blocks per level.
        attention_downsamples: downsampling factors (1, 2, 4, ...) with attention.
        num_head_channels: channels per attention head.
        norm_num_groups: groups of each group normalisation.
        pool: what turns the last map into class scores.
        dropout: dropout probability in residual blocks, for a classifier to start from, too.
    """

    may_change: ClassVar[frozenset[str]] = TrainingSettings.may_change | SAMPLING

    output_dir: str = "out/digits-classifier-guided"
    max_train_steps: PositiveInt = 800
    learning_rate: PositiveFloat = 2e-3
    label_column: str = "label"
    shift_augmentation: NonNegativeInt = 0
    label_smoothing: ClosedUnitInterval = 0.0
    diffusion_model: str | None = None
    num_train_timesteps: PositiveInt | None = None
    beta_schedule: str | None = None
    beta_start: PositiveFloat | None = None
    beta_end: PositiveFloat | None = None
    classification_weight: NonNegativeFloat = 1.0
    guided_denoising_weight: NonNegativeFloat = 0.0
    guidance_scale: NonNegativeFloat = 8.0
    sample_images: NonNegativeInt = 10
    sample_steps: PositiveInt = 50
    judge: str | None = None
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
        if self.init_classifier and (given := self.given(ARCHITECTURE)):
            raise ValueError(f"`init_classifier` already says {', '.join(given)}, got {given}; leave these out, or it.")
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


def find_diffusion_model(settings: ClassifierSettings) -> ClassifierSettings:
    """The settings, with a bare `train_ddpm.py`'s diffusion model where a run on the digits names no noise levels."""
    if settings.dataset != DIGITS or settings.diffusion_model or settings.init_classifier or settings.given(LEVELS):
        return settings
    found = Path(BARE_DIFFUSION_MODEL, "model_index.json").is_file()
    if is_first_process():
        print(f"Guiding the diffusion model in {BARE_DIFFUSION_MODEL}." if found else NO_MODEL)
    return replace(settings, diffusion_model=BARE_DIFFUSION_MODEL) if found else settings


def load_diffusion_model(settings: ClassifierSettings) -> tuple[ModelMixin | None, Levels]:
    """The frozen network to guide, if any, and the noise levels: its own, those given, or those of `init_classifier`.

    Raises:
        ValueError: when it is not there, or the levels given are not its own.
    """
    source, given = settings.diffusion_model, settings.given(LEVELS)
    if not source:
        return None, make_levels(given or read_config(settings).get("noise_schedule") or {})
    unet, scheduler = open_diffusion_model(source)
    own = noise_schedule(scheduler)
    for name, value in given.items():
        if own.get(name) != value:
            raise ValueError(f"`{name}` must be the diffusion model's, {own.get(name)}, got {value}; leave it out.")
    conditional = unet.config.get("num_class_embeds") is not None
    if settings.guided_denoising_weight and (conditional or not getattr(scheduler, "scales_input", True)):
        raise ValueError(
            "`guided_denoising_weight` needs an unconditional `diffusion_model` whose input has unit variance, got "
            f"{source!r}; use 0."
        )
    return unet.requires_grad_(False), scheduler


def make_classifier(
    settings: ClassifierSettings, data: LabelledImages, unet: ModelMixin | None, scheduler: Levels
) -> NoisyClassifier:
    """A new classifier for the data, or the one to start from.

    Raises:
        ValueError: when the diffusion model or the classifier to start from is for other images, classes or noise.
    """
    _, channels, size, _ = data.images.shape
    images = {"in_channels": channels, "sample_size": size}
    if unet is not None:
        check_same("diffusion_model", unet.config, images)
    run = {
        "dropout": settings.dropout,
        "id2label": dict(enumerate(data.label_names)),
        "noise_schedule": noise_schedule(scheduler),
    }
    images["num_classes"] = len(data.label_names)
    if not settings.init_classifier:
        return NoisyClassifier(**images, **run, **(SMALL | settings.given(ARCHITECTURE)))
    before = read_config(settings)
    check_same("init_classifier", before, images)
    expected, came = run["noise_schedule"], before.get("noise_schedule")
    if came and not has_noise_levels(scheduler, came):
        raise ValueError(f"`init_classifier` must know the run's noise levels, {expected}, got {came}; take another.")
    return NoisyClassifier.from_pretrained(settings.init_classifier, **run)


def read_config(settings: ClassifierSettings) -> dict[str, Any]:
    """The configuration of the classifier to start from; empty where there is none."""
    if not settings.init_classifier:
        return {}
    with reading_model("init_classifier", settings.init_classifier):
        return NoisyClassifier.load_config(settings.init_classifier)


def check_same(argument: str, theirs: Any, images: dict[str, int]) -> None:
    """Refuses a model for other images than the dataset's."""
    came = {name: theirs.get(name) for name in images}
    if came != images:
        raise ValueError(f"`{argument}` must be for the dataset's {images}, got {came}; use another or a `resolution`.")


def make_loss(settings: ClassifierSettings, unet: ModelMixin | None, scheduler: Levels, classes: int) -> Loss:
    """The weighted sum of the two losses; one of weight 0 is not computed."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        terms = []
        if settings.classification_weight:
            labels = smooth_labels(batch.labels, classes, settings.label_smoothing)
            cross_entropy = classification_loss(model, scheduler, *batch._replace(labels=labels))
            terms.append(settings.classification_weight * cross_entropy)
        if settings.guided_denoising_weight:
            terms.append(settings.guided_denoising_weight * guided_denoising_loss(model, unet, scheduler, *batch))
        return torch.stack(terms).sum()

    return loss


def smooth_labels(labels: Tensor, classes: int, share: float) -> Tensor:
    """(1-s) of each label and s spread over all K classes (Szegedy et al. 2016, section 7); (B,) to (B, K)."""
    return (1 - share) * F.one_hot(labels, classes).float() + share / classes if share else labels


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script with the given flags, or those of the process."""
    settings = find_diffusion_model(parse_settings(ClassifierSettings, argv, __doc__ or ""))
    data, validation = load_training_data(settings, settings.label_column)
    unet, scheduler = load_diffusion_model(settings)
    accelerator = make_accelerator(settings)
    classifier = make_classifier(settings, data, unet, scheduler)
    # Whatever may refuse what does not fit does so before the training.
    pipe = None if unet is None else ClassifierGuidedPipeline(unet, classifier, scheduler, settings.guidance_scale)
    if settings.judge:
        load_judge(settings.judge, classifier)
    if settings.guided_denoising_weight:
        unet.to(accelerator.device)
    augmentation = Augmentation(not settings.center_crop, settings.random_flip, settings.shift_augmentation)
    size = settings.train_batch_size * accelerator.num_processes
    batches = BatchStream(data, size, len(scheduler), settings.seed, augmentation=augmentation)
    repository = on_main(accelerator, lambda: find_repository(settings))
    monitor = make_monitor(classifier, scheduler, validation, settings.seed) if validation else None
    loss = make_loss(settings, unet, scheduler, len(data.label_names))
    train(settings, accelerator, classifier, batches, loss, monitor=monitor)
    if accelerator.is_main_process:
        finish(settings, pipe or classifier, scheduler, data, validation, repository)


def finish(
    settings: ClassifierSettings,
    trained: ClassifierGuidedPipeline | NoisyClassifier,
    scheduler: Levels,
    data: LabelledImages,
    validation: LabelledImages | None,
    repository: str | None,
) -> None:
    """Saves what was trained, measures it, writes its card, and publishes it where a repository is named."""
    guided = isinstance(trained, ClassifierGuidedPipeline)
    classifier = trained.classifier if guided else trained
    usage = (USAGE if guided else USAGE_ALONE).format(
        folder=repository or settings.output_dir, label=data.label_names[0], steps=min(50, most_steps(scheduler))
    )
    with placed(settings.output_dir) as folder:
        trained.save_pretrained(folder)
        numbers = report_noise_levels(classifier, scheduler, validation, settings.seed, folder) if validation else []
        if guided and settings.sample_images:
            per_class, steps = settings.sample_images, settings.sample_steps
            options = {"per_class": per_class, "steps": steps, "judge": settings.judge, "seed": settings.seed}
            numbers += report_samples(trained.to(classifier.device), folder, **options)
        write_card(
            folder,
            title="Classifier-guided diffusion" if guided else "A classifier of noisy images",
            settings=settings,
            data=data,
            numbers=numbers,
            usage=usage,
            tags=["classifier-guidance"],
            pipeline_tag="unconditional-image-generation" if guided else "image-classification",
        )
    if repository:
        publish(settings.output_dir, repository)


if __name__ == "__main__":
    run_script(main)
