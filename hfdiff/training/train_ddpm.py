"""Training of a denoising diffusion model (Ho et al. 2020), saved as a pipeline folder: `unet/` and `scheduler/`.

After `import hfdiff`, the folder opens with `diffusers.DDPMPipeline.from_pretrained`; that of a class-conditional model
with `hfdiff.ClassifierGuidedPipeline.from_pretrained`, which draws it by class.
"""

import copy
from functools import partial

from diffusers import DDPMPipeline, DiffusionPipeline
from torch import Tensor, nn

from ..data.labelled import LabelledImages
from ..data.process import on_main
from ..models.adm_unet import ADMUNet
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..schedulers.checks import LEARNED_VARIANCES
from ..schedulers.scheduling_ddpm import DDPMScheduler
from .augmentation import Augmentation
from .batches import Batch, choose_flips, derive_seed, load_training_data, make_batches
from .card import find_repository
from .diffusion_model import DiffusionModel, open_diffusion_model, take_over
from .finish import common_measures, finish
from .geometry import ToldUNet
from .loop import make_accelerator, train
from .losses import Model, ddpm_losses, weighted_mean
from .monitor import BOUND_TERMS, held_out_bound, make_monitor
from .samples import draw_images
from .settings import DDPMSettings
from .timesteps import LossSecondMomentSampler
from .unet import UNet, build_adm_unet, build_unet, with_classes

USAGE = """import hfdiff
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{folder}")
image = pipe(num_inference_steps={steps}).images[0]"""
USAGE_CONDITIONAL = """from hfdiff import ClassifierGuidedPipeline

pipe = ClassifierGuidedPipeline.from_pretrained("{folder}")
image = pipe([{label!r}], num_inference_steps={steps}).images[0]"""
LEVELS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "variance_type")
SIZES = ("block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim")


def run(settings: DDPMSettings) -> None:
    """Trains the model of the settings, measures and saves it."""
    start = open_diffusion_model(settings.init_from, "init_from") if settings.init_from else None
    if start:
        settings = take_over(settings, "init_from", tell(start, settings))
    conditional, channels = settings.class_conditional, start and start.channels
    labelled = conditional or settings.needs_labels
    data, validation = load_training_data(settings, settings.label_column if labelled else None, channels)
    data = data if labelled else data._replace(labels=None)
    validation = validation if conditional or not validation else validation._replace(labels=None)
    accelerator = make_accelerator(settings)
    scheduler = make_scheduler(settings, start)
    unet = make_unet(settings, data, start)
    sampler = LossSecondMomentSampler(len(scheduler)) if settings.time_sampling == "loss-second-moment" else None
    augmentation = Augmentation(not settings.center_crop, choose_flips(settings, data))
    batches = make_batches(
        settings,
        data,
        len(scheduler),
        accelerator.num_processes,
        augmentation=augmentation,
        time_sampler=sampler,
        class_dropout=settings.class_dropout,
        balance_classes=settings.balance_classes,
        augment_probability=settings.augment_probability,
    )
    trained = ToldUNet(unet) if settings.augment_probability else unet
    repository = on_main(accelerator, lambda: find_repository(settings))
    pipe = make_pipeline(unet, scheduler, data)

    def losses(model: Model, x0: Tensor, timestep: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        options = {name: getattr(settings, name) for name in ("loss_type", "snr_gamma", "vlb_weight")}
        return ddpm_losses(model, scheduler, x0, timestep, noise, class_labels=labels, **options)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        told = model if batch.augment_labels is None else partial(model, augment_labels=batch.augment_labels)
        values = losses(told, batch.x0, batch.timestep, batch.noise, batch.labels if conditional else None)
        if sampler:
            sampler.update(*accelerator.gather((batch.timestep, values.detach())))
        return weighted_mean(values, batch.weight)

    def draw(count: int) -> Tensor:
        return draw_images(pipe, count, settings.sample_steps, derive_seed(settings.seed, "samples", 0))

    bound = None
    if validation and settings.bits_per_dim_images:
        held_out = validation.spread(settings.bits_per_dim_images)
        bound = partial(held_out_bound, unet, scheduler, held_out, settings.seed)
    monitor = make_monitor(settings, accelerator, unet, len(scheduler), losses, draw, data, validation, bound)
    train(settings, accelerator, trained, batches, loss, stateful=[sampler] if sampler else [], monitor=monitor)
    if not accelerator.is_main_process:
        return
    measures = common_measures(settings, validation, settings.loss_type)
    if validation:
        count = min(len(validation.images), settings.bits_per_dim_images)
        measures["bits_per_dim"] = (
            "variational bound (bits per dimension)",
            f"{count} held-out images, {BOUND_TERMS} terms of {len(scheduler)}, the others interpolated",
        )
    finish(
        settings,
        make_pipeline(unet, scheduler, data),
        data,
        title="Denoising diffusion model",
        usage=describe_usage(settings, scheduler, data),
        tag="ddpm",
        measures=measures,
        repository=repository,
    )


def tell(start: DiffusionModel, settings: DDPMSettings) -> dict[str, object]:
    """The settings that a model to start from says.

    Raises:
        ValueError: for a model of another family.
    """
    config = start.unet.config
    if not isinstance(start.unet, UNet) or not isinstance(start.scheduler, DDPMScheduler | None):
        raise ValueError(
            f"`init_from` must be a diffusion model, got {type(start.unet).__name__} in {settings.init_from!r}; a "
            "score network starts `hfdiff train ncsn`."
        )
    told = tell_sizes(start.unet)
    told["class_conditional"] = settings.class_conditional or config.get("num_class_embeds") is not None
    told["resolution"] = settings.resolution or start.size
    return told | ({} if start.scheduler is None else {name: start.scheduler.config[name] for name in LEVELS})


def tell_sizes(unet: UNet) -> dict[str, object]:
    """The settings of a UNet's sizes."""
    config = unet.config
    if not isinstance(unet, ADMUNet):
        told: dict[str, object] = {name: config[name] for name in SIZES if config.get(name) is not None}
        return told | {"architecture": "unet", "block_out_channels": tuple(config["block_out_channels"])}
    width = config["num_head_channels"]
    return {
        "architecture": "adm",
        "block_out_channels": tuple(int(mult * config["model_channels"]) for mult in config["channel_mult"]),
        "layers_per_block": config["num_res_blocks"],
        "norm_num_groups": config["norm_num_groups"],
        **({"num_heads": config["num_heads"]} if width is None else {"attention_head_dim": width}),
    }


def make_scheduler(settings: DDPMSettings, start: DiffusionModel | None = None) -> DDPMScheduler:
    """The chain to train: that of the model to start from, where there is one, else that of the settings.

    Raises:
        ValueError: for an unknown schedule, β outside (0, 1], or one at whose end the noise says nothing of x_0.
    """
    if start and isinstance(start.scheduler, DDPMScheduler):
        return start.scheduler
    scheduler = DDPMScheduler(**{name: getattr(settings, name) for name in LEVELS})
    if settings.prediction_type == "epsilon" and not scheduler.alphas_cumprod[-1]:
        raise ValueError(
            f"`prediction_type` must not be 'epsilon' for `beta_schedule` {settings.beta_schedule!r}, which ends in "
            "pure noise, where noise says nothing of x_0; use 'v_prediction' or 'sample'."
        )
    return scheduler


def make_unet(settings: DDPMSettings, data: LabelledImages, start: DiffusionModel | None = None) -> UNet:
    """The UNet for a dataset's images (N, C, H, W), and its classes, where it is told them, or the one to start from.

    Raises:
        ValueError: when the images cannot be halved once per level, or the one to start from is for other images.
    """
    outputs = 2 if settings.variance_type in LEARNED_VARIANCES else 1
    classes = len(data.label_names) + bool(settings.class_dropout) if settings.class_conditional else None
    if start is None:
        build = build_adm_unet if settings.architecture == "adm" else build_unet
        return build(settings, data, outputs, classes)
    if classes and start.unet.config.get("num_class_embeds") is None:
        start = start._replace(unet=with_classes(start.unet, classes))
    expected = {
        "in_channels": data.images.shape[1],
        "out_channels": outputs * data.images.shape[1],
        "num_class_embeds": classes,
    }
    came = {name: start.unet.config.get(name) for name in expected}
    if came != expected:
        raise ValueError(
            f"`init_from` must be for the dataset's images and classes and the `variance_type` "
            f"{settings.variance_type!r}, {expected}, got {came}; start from another model."
        )
    start.unet.register_to_config(sample_size=data.images.shape[2])
    return start.unet


def make_pipeline(unet: UNet, scheduler: DDPMScheduler, data: LabelledImages) -> DiffusionPipeline:
    """The pipeline that draws from a UNet, by class where it is told the classes, with a scheduler of its own."""
    scheduler = copy.copy(scheduler)
    if unet.config.num_class_embeds is None:
        return DDPMPipeline(unet, scheduler)
    return ClassifierGuidedPipeline(unet, None, scheduler, id2label=dict(enumerate(data.label_names)))


def describe_usage(settings: DDPMSettings, scheduler: DDPMScheduler, data: LabelledImages) -> str:
    """Code that loads the pipeline of a `{folder}`."""
    steps = min(settings.sample_steps, len(scheduler))
    if not settings.class_conditional:
        return USAGE.format(folder="{folder}", steps=steps)
    return USAGE_CONDITIONAL.format(folder="{folder}", steps=steps, label=data.label_names[0])
