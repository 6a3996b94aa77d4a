"""Training of a classifier of noisy images (Dhariwal & Nichol 2021, section 4) to guide a diffusion model.

With `diffusion_model` the whole guided pipeline is saved, otherwise the classifier alone. A run on the digits without
any takes the model that a bare `hfdiff train ddpm` leaves, where there is one.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.labelled import LabelledImages
from ..data.process import is_first_process, on_main
from ..data.sources import DIGITS, reading_model
from ..models.noisy_classifier import NoisyClassifier
from ..pipelines.inputs import has_noise_levels, most_steps
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from .augmentation import Augmentation
from .batches import choose_flips, load_training_data, make_batches
from .card import find_repository, publish, write_card
from .checkpoints import placed
from .classifier_report import load_judge, make_monitor, report_gradient, report_noise_levels, report_samples
from .config import RunSettings
from .diffusion_model import DiffusionModel, Levels, make_levels, model_folder, noise_schedule, open_diffusion_model
from .finish import tell_what_was_made
from .loop import Loss, make_accelerator, train
from .losses import classification_loss, guided_denoising_loss
from .settings import ARCHITECTURE, LEVELS, ClassifierSettings
from .timesteps import LogSNRSampler
from .unet import without_classes

BARE_DIFFUSION_MODEL = "out/digits-ddpm"
NO_MODEL = (
    f"No diffusion model in {BARE_DIFFUSION_MODEL}: the classifier is trained for the linear schedule and saved alone. "
    "Train one first by `hfdiff train ddpm`, or name one with `--diffusion_model`."
)
SMALL = {"model_channels": 16, "num_head_channels": 16, "norm_num_groups": 8}
USAGE = """from hfdiff import ClassifierGuidedPipeline

pipe = ClassifierGuidedPipeline.from_pretrained("{folder}")
image = pipe([{label!r}], num_inference_steps={steps}).images[0]"""
USAGE_ALONE = """from hfdiff import NoisyClassifier

classifier = NoisyClassifier.from_pretrained("{folder}")
names = classifier.id2label  # logits: classifier(noisy_images, timestep).logits"""


def run(settings: ClassifierSettings, recipe: RunSettings | None = None) -> None:
    """Trains the classifier of the settings, measures and saves it.

    Args:
        settings: of the run.
        recipe: what the card shows, where the run is part of another; by default the settings.
    """
    settings = find_diffusion_model(settings)
    teacher = open_teacher(settings) if settings.teacher else None
    guided = open_diffusion_model(settings.diffusion_model) if settings.diffusion_model else teacher
    if teacher is not None and guided is teacher:
        guided = teacher._replace(unet=without_classes(teacher.unet))
    scheduler = choose_levels(settings, guided)
    size, channels = images_of(settings, guided)
    settings = replace(settings, resolution=settings.resolution or size)
    data, validation = load_training_data(settings, settings.label_column, channels)
    if guided is not None:
        guided.unet.requires_grad_(False)
        data = named_as(data, guided.id2label, "diffusion_model")
        validation = validation and validation._replace(label_names=data.label_names)
    accelerator = make_accelerator(settings)
    classifier = make_classifier(settings, data, guided, scheduler)
    unet = None if guided is None else guided.unet
    # Whatever may refuse what does not fit does so before the training.
    pipe = None if unet is None else ClassifierGuidedPipeline(unet, classifier, scheduler)
    if settings.judge:
        load_judge(settings.judge, classifier)
    if unet is not None and settings.guided_denoising_weight:
        unet.to(accelerator.device)
    denoiser = unet
    if teacher is not None:
        check_teacher(teacher, scheduler, data)
        teacher.unet.requires_grad_(False).to(accelerator.device)
        denoiser = without_classes(teacher.unet)  # what differs between the two is the class alone
    augmentation = Augmentation(not settings.center_crop, choose_flips(settings, data), settings.shift_augmentation)
    sampler = LogSNRSampler(scheduler.alphas_cumprod) if settings.time_sampling == "log-snr" else None
    batches = make_batches(
        settings,
        data,
        len(scheduler),
        accelerator.num_processes,
        augmentation=augmentation,
        time_sampler=sampler,
        balance_classes=settings.balance_classes,
        augment_probability=settings.augment_probability,
        keep_class=True,
    )
    repository = on_main(accelerator, lambda: find_repository(settings))
    monitor = make_monitor(unet, classifier, scheduler, validation, settings.seed) if validation else None
    loss = make_loss(settings, denoiser, teacher and teacher.unet, scheduler, len(data.label_names))
    train(settings, accelerator, classifier, batches, loss, monitor=monitor)
    if accelerator.is_main_process:
        finish(settings, pipe or classifier, scheduler, data, validation, repository, recipe or settings)


def find_diffusion_model(settings: ClassifierSettings) -> ClassifierSettings:
    """The settings, with the model of a bare `hfdiff train ddpm` where a run on the digits names no noise levels."""
    named = settings.diffusion_model or settings.teacher or settings.init_from or settings.given(LEVELS)
    if settings.dataset != DIGITS or named:
        return settings
    found = Path(BARE_DIFFUSION_MODEL, "model_index.json").is_file()
    if is_first_process():
        print(f"Guiding the diffusion model in {BARE_DIFFUSION_MODEL}." if found else NO_MODEL)
    return replace(settings, diffusion_model=BARE_DIFFUSION_MODEL) if found else settings


def open_teacher(settings: ClassifierSettings) -> DiffusionModel:
    """The class-conditional model to distil from.

    Raises:
        ValueError: for one that is told no classes, or never went without.
    """
    assert settings.teacher is not None
    teacher = open_diffusion_model(settings.teacher, "teacher")
    classes = teacher.unet.config.get("num_class_embeds")
    if teacher.scheduler is None or classes != len(teacher.id2label) + 1:
        raise ValueError(
            "`teacher` must be the pipeline of a class-conditional model that also draws without a class, got "
            f"{settings.teacher!r}; train it by `hfdiff train ddpm --class_conditional --class_dropout 0.1`."
        )
    return teacher


def check_teacher(teacher: DiffusionModel, scheduler: Levels, data: LabelledImages) -> None:
    """Refuses a teacher of other noise levels or classes than the run's."""
    assert teacher.scheduler is not None
    ours, theirs = noise_schedule(scheduler), noise_schedule(teacher.scheduler)
    if ours != theirs:
        raise ValueError(
            f"`teacher` must know the diffusion model's noise levels, {ours}, got {theirs}; train it by `--init_from` "
            "that model."
        )
    named_as(data, teacher.id2label, "teacher")


def choose_levels(settings: ClassifierSettings, guided: DiffusionModel | None) -> Levels:
    """The noise levels: those of the model to guide, those given, or those of `init_from`.

    Raises:
        ValueError: when the levels given are not the model's, or its classifier could not be trained as asked.
    """
    given = settings.given(LEVELS)
    if guided is None:
        return make_levels(given or read_config(settings).get("noise_schedule") or {})
    if guided.scheduler is None:
        raise ValueError(
            f"`diffusion_model` must be a pipeline, with its noise levels, got {settings.diffusion_model!r}, a network "
            "alone; name the folder above it."
        )
    own = noise_schedule(guided.scheduler)
    for name, value in given.items():
        if own.get(name) != value:
            raise ValueError(f"`{name}` must be the diffusion model's, {own.get(name)}, got {value}; leave it out.")
    conditional = guided.unet.config.get("num_class_embeds") is not None
    if settings.guided_denoising_weight and (conditional or not getattr(guided.scheduler, "scales_input", True)):
        raise ValueError(
            "`guided_denoising_weight` needs an unconditional `diffusion_model` whose input has unit variance, got "
            f"{settings.diffusion_model!r}; use 0."
        )
    return guided.scheduler


def images_of(settings: ClassifierSettings, guided: DiffusionModel | None) -> tuple[int | None, int | None]:
    """Size and channels of the images, as the model to guide, or the classifier to start from, has them."""
    if guided is not None:
        return guided.size, guided.channels
    config = read_config(settings)
    return config.get("sample_size"), config.get("in_channels")


def named_as(data: LabelledImages, id2label: dict[int, str], argument: str) -> LabelledImages:
    """The dataset with the names of a model's classes, where its own are numbers alone.

    Raises:
        ValueError: for other classes.
    """
    names = [id2label[index] for index in sorted(id2label)]
    numbers = [str(number) for number in range(len(data.label_names))]
    if not names or data.label_names == names:
        return data
    if data.label_names != numbers or len(names) != len(numbers):
        raise ValueError(f"`{argument}` must have the dataset's classes, {data.label_names}, got {names}; use another.")
    return data._replace(label_names=names)


def make_classifier(
    settings: ClassifierSettings, data: LabelledImages, guided: DiffusionModel | None, scheduler: Levels
) -> NoisyClassifier:
    """A new classifier for the data, or the one to start from.

    Raises:
        ValueError: when the diffusion model or the classifier to start from is for other images, classes or noise.
    """
    _, channels, size, _ = data.images.shape
    images = {"in_channels": channels, "sample_size": size}
    if guided is not None:
        check_same("diffusion_model", guided.unet.config, images)
    run = {
        "dropout": settings.dropout,
        "id2label": dict(enumerate(data.label_names)),
        "noise_schedule": noise_schedule(scheduler),
        "guidance_scale": settings.guidance_scale,
    }
    images["num_classes"] = len(data.label_names)
    if not settings.init_from:
        return NoisyClassifier(**images, **run, **(SMALL | settings.given(ARCHITECTURE)))
    before = read_config(settings)
    check_same("init_from", before, images)
    expected, came = run["noise_schedule"], before.get("noise_schedule")
    if came and not has_noise_levels(scheduler, came):
        raise ValueError(f"`init_from` must know the run's noise levels, {expected}, got {came}; take another.")
    return NoisyClassifier.from_pretrained(classifier_folder(settings.init_from), **run)


def read_config(settings: ClassifierSettings) -> dict[str, Any]:
    """The configuration of the classifier to start from; empty where there is none."""
    if not settings.init_from:
        return {}
    with reading_model("init_from", settings.init_from):
        return NoisyClassifier.load_config(classifier_folder(settings.init_from))


def classifier_folder(source: str) -> Path:
    """The folder of a classifier, which may be part of a guided pipeline."""
    folder = model_folder(source)
    return folder / "classifier" if (folder / "classifier").is_dir() else folder


def check_same(argument: str, theirs: Any, images: dict[str, int]) -> None:
    """Refuses a model for other images than the dataset's."""
    came = {name: theirs.get(name) for name in images}
    if came != images:
        raise ValueError(f"`{argument}` must be for the dataset's {images}, got {came}; use another or a `resolution`.")


def make_loss(settings: ClassifierSettings, unet: Any, teacher: Any, scheduler: Levels, classes: int) -> Loss:
    """The weighted sum of the two losses; one of weight 0 is not computed."""

    def loss(model: nn.Module, batch: Any) -> Tensor:  # a `Batch` with labels
        terms, drawn = [], (batch.x0, batch.timestep, batch.noise)
        if settings.classification_weight:
            labels = smooth_labels(batch.labels, classes, settings.label_smoothing)
            cross_entropy = classification_loss(model, scheduler, *drawn, labels, batch.weight)
            terms.append(settings.classification_weight * cross_entropy)
        if settings.guided_denoising_weight:
            denoising = guided_denoising_loss(
                model, unet, scheduler, *drawn, batch.labels, batch.weight, teacher=teacher
            )
            terms.append(settings.guided_denoising_weight * denoising)
        return torch.stack(terms).sum()

    return loss


def smooth_labels(labels: Tensor, classes: int, share: float) -> Tensor:
    """(1-s) of each label and s spread over all K classes (Szegedy et al. 2016, section 7); (B,) to (B, K)."""
    return (1 - share) * F.one_hot(labels, classes).float() + share / classes if share else labels


def finish(
    settings: ClassifierSettings,
    trained: ClassifierGuidedPipeline | NoisyClassifier,
    scheduler: Levels,
    data: LabelledImages,
    validation: LabelledImages | None,
    repository: str | None,
    recipe: RunSettings,
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
        if guided and validation:
            numbers += report_gradient(trained.unet, classifier, scheduler, validation, settings.seed, folder)
        if guided and settings.sample_images:
            per_class, steps = settings.sample_images, settings.sample_steps
            options = {"per_class": per_class, "steps": steps, "judge": settings.judge, "seed": settings.seed}
            numbers += report_samples(trained.to(classifier.device), folder, data, validation, **options)
        write_card(
            folder,
            title="Classifier-guided diffusion" if guided else "A classifier of noisy images",
            settings=recipe,
            data=data,
            numbers=numbers,
            usage=usage,
            tags=["classifier-guidance"],
            pipeline_tag="unconditional-image-generation" if guided else "image-classification",
        )
    if repository:
        publish(settings.output_dir, repository)
    tell_what_was_made(settings.output_dir, trained)
