"""The settings of each training. They are checked before slow imports, so nothing here needs torch or diffusers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..schedulers.checks import LEARNED_VARIANCES
from .config import RunSettings, TrainingSettings

LossType = Literal["simple", "vlb", "hybrid"]
BetaSchedule = Literal[  # of `schedulers.noise.BETA_SCHEDULES`
    "linear", "scaled_linear", "quad", "const", "jsd", "warmup10", "warmup50", "squaredcos_cap_v2", "laplace", "sigmoid"
]

LOSS_TYPES = ("simple", "vlb", "hybrid")
VLB_WEIGHT = 0.001  # λ of Nichol & Dhariwal (2021), section 3.1
WEIGHTED_BY_SNR = ("epsilon", "sample", "v_prediction")  # the predictions of `losses.MIN_SNR_WEIGHTS`
LEVELS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")  # of a classifier
ARCHITECTURE = (
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_downsamples",
    "num_head_channels",
    "norm_num_groups",
    "pool",
)  # of a new one
LEAST_SECONDS = 10  # of a time budget
SAMPLING = {"guidance_scale", "sample_images", "sample_steps", "judge"}  # settings that do not reach the weights


def check_objective(loss_type: str, variance_type: str, prediction_type: str, snr_gamma: float | None) -> None:
    """Refuses an objective that cannot train the model it is for; arguments as in [`ddpm_losses`].

    Raises:
        ValueError: for another objective, hybrid with a fixed variance, or `snr_gamma` where nothing is weighted by it.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"`loss_type` must be one of {LOSS_TYPES}, got {loss_type!r}.")
    if loss_type == "hybrid" and variance_type not in LEARNED_VARIANCES:
        raise ValueError(
            f'`loss_type` "hybrid" needs a `variance_type` among {LEARNED_VARIANCES}, whose variance its bound trains, '
            f'got {variance_type!r}; choose "learned_range", or the loss "simple" or "vlb".'
        )
    if snr_gamma is not None and (loss_type == "vlb" or prediction_type not in WEIGHTED_BY_SNR or snr_gamma <= 0):
        raise ValueError(
            '`snr_gamma` must be positive, and weights the simple loss of "simple" and "hybrid" for predictions '
            f"{WEIGHTED_BY_SNR}, got {snr_gamma} with `loss_type` {loss_type!r} and `prediction_type` "
            f"{prediction_type!r}; leave it out, or change these."
        )


@dataclass(kw_only=True)
class UNetSettings(TrainingSettings):
    """Settings of a UNet.

    Args:
        block_out_channels: widths of the UNet, one per level; each level after the first halves height and width.
        layers_per_block: residual blocks per level.
        attention: levels with attention, from 0 for the images' own size; negative numbers count from the last.
        norm_num_groups: groups of each group normalisation.
        attention_head_dim: channels per attention head.
        dropout: dropout probability in residual blocks.
    """

    block_out_channels: tuple[PositiveInt, ...] = (16, 32)
    layers_per_block: PositiveInt = 1
    attention: tuple[int, ...] = (-1,)
    norm_num_groups: PositiveInt = 8
    attention_head_dim: PositiveInt = 16
    dropout: ClosedUnitInterval = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        if not all(-levels <= level < levels for level in self.attention):
            raise ValueError(f"`attention` must name levels from {-levels} to {levels - 1}, got {self.attention}.")
        for width in self.block_out_channels:
            if width % self.norm_num_groups or width == self.norm_num_groups:
                raise ValueError(
                    f"`norm_num_groups` must divide every width with at least 2 channels per group, since one alone "
                    f"normalises the time embedding away, got {self.norm_num_groups} for {width} channels; lower it."
                )
        self._check_heads("attention_head_dim")

    def _check_heads(self, name: str) -> None:
        divisor = getattr(self, name)
        for level in {*self.attention, -1}:  # the middle block attends, too
            if self.block_out_channels[level] % divisor:
                raise ValueError(
                    f"`{name}` must divide the widths with attention, got {divisor} for "
                    f"{self.block_out_channels[level]} channels; lower it."
                )


@dataclass(kw_only=True)
class LabelSettings(RunSettings):
    """Settings of what labels are for.

    Args:
        label_column: the dataset's column of labels; read for a model that is told classes or tells them, and for the
            settings below.
        balance_classes: draw every class equally often, however many images it has; an epoch has as many images as
            before.
        random_flip_classes: mirror images of these classes alone left and right, every second time; names or numbers,
            face,hand or ["left hand", 3].
    """

    label_column: str = "label"
    balance_classes: bool = False
    random_flip_classes: tuple[str | int, ...] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.random_flip_classes, str):
            self.random_flip_classes = tuple(name.strip() for name in self.random_flip_classes.split(","))
        if self.random_flip and self.random_flip_classes:
            raise ValueError(
                "`random_flip` mirrors the images of every class, got `random_flip_classes` "
                f"{self.random_flip_classes}, too; leave one out."
            )

    @property
    def needs_labels(self) -> bool:
        """Whether the batches need labels, whatever the model does with them."""
        return self.balance_classes or bool(self.random_flip_classes)


@dataclass(kw_only=True)
class MonitorSettings(TrainingSettings):
    """Settings of a diffusion model's validation, every `validation_steps` and at the end.

    Args:
        validation_images: images of the validation data, at most, whose loss is measured.
        sample_images: images of the grid `samples/step-N.png`, whose mean colour is compared to the data's; 0 draws
            none.
        sample_steps: model calls per drawn image.
        prediction_type: what the model predicts.
        fid_features: the folder of a NoisyClassifier; measures the Fréchet distance to the dataset in its features.
        fid_images: images drawn for that.
    """

    may_change: ClassVar[frozenset[str]] = TrainingSettings.may_change | {
        "validation_images",
        "sample_images",
        "sample_steps",
        "fid_features",
        "fid_images",
    }

    validation_images: PositiveInt = 1000
    sample_images: NonNegativeInt = 64
    sample_steps: PositiveInt = 50
    prediction_type: str = "epsilon"
    fid_features: str | None = None
    fid_images: PositiveInt = 1000


@dataclass(kw_only=True)
class DDPMSettings(UNetSettings, MonitorSettings, LabelSettings):
    """Settings of a diffusion model's training.

    Args:
        bits_per_dim_images: images of the validation data, at most, whose variational bound is measured; 0 measures
            none.
        class_conditional: train one model of all classes that is told which to draw; it may start from one that is not.
        class_dropout: share of the images whose class it is not told, so that it also draws without one.
        num_train_timesteps: T, length of the chain.
        beta_schedule: the noise levels, by a name of hfdiff.schedulers.noise.make_betas.
        beta_start: their first β, where the schedule has one.
        beta_end: their last β, where the schedule has one.
        prediction_type: what the UNet predicts: the noise, x_0 or v.
        architecture: "unet" (diffusers' UNet2DModel), or "adm", the UNet of Dhariwal & Nichol (2021): adaptive group
            norm, residual blocks that resize; its widths are multiples of the first.
        num_heads: attention heads of an "adm", instead of attention_head_dim.
        variance_type: the variance of a reverse step; "learned_range" and "learned" are the UNet's to predict.
        loss_type: "simple", "vlb", the variational bound, or "hybrid", both, the bound for a learned variance alone.
        vlb_weight: of the bound in the hybrid loss.
        snr_gamma: weight the simple loss by min-SNR-γ with this γ.
        time_sampling: "uniform", or "loss-second-moment", which draws timesteps of large losses more often.
        augment_probability: mirror, scale, turn, stretch and shift the images, each with this probability, and tell the
            model how, so that its samples are like the images as they are; 0.12 to 0.15 in EDM.
    """

    may_change: ClassVar[frozenset[str]] = MonitorSettings.may_change | {"bits_per_dim_images"}

    output_dir: str = "out/digits-ddpm"
    bits_per_dim_images: NonNegativeInt = 100
    max_train_steps: PositiveInt = 800
    learning_rate: PositiveFloat = 2e-3
    class_conditional: bool = False
    class_dropout: ClosedUnitInterval = 0.0
    num_train_timesteps: PositiveInt = 1000
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    beta_start: PositiveFloat = 1e-4
    beta_end: PositiveFloat = 0.02
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    architecture: Literal["unet", "adm"] = "unet"
    num_heads: PositiveInt | None = None
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = "fixed_small"
    loss_type: LossType = "simple"
    vlb_weight: NonNegativeFloat = VLB_WEIGHT
    snr_gamma: PositiveFloat | None = None
    time_sampling: Literal["uniform", "loss-second-moment"] = "uniform"
    augment_probability: ClosedUnitInterval = 0.0

    def _check_heads(self, name: str) -> None:
        super()._check_heads(name if self.num_heads is None else "num_heads")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_objective(self.loss_type, self.variance_type, self.prediction_type, self.snr_gamma)
        first, *others = self.block_out_channels
        if self.architecture == "adm" and not self.init_from and any(width % first for width in others):
            raise ValueError(
                f'`block_out_channels` must be multiples of the first for `architecture` "adm", got '
                f"{self.block_out_channels}; round them."
            )
        if self.num_heads is not None and self.architecture != "adm":
            raise ValueError(
                f'`num_heads` needs the `architecture` "adm", got {self.num_heads} with {self.architecture!r}; give '
                "`attention_head_dim` instead."
            )
        if self.class_dropout and not self.class_conditional:
            raise ValueError(
                f"`class_dropout` needs `class_conditional`, got {self.class_dropout} without; switch that on or leave "
                "this out."
            )
        if self.loss_type == "simple" and self.variance_type in LEARNED_VARIANCES:
            raise ValueError(
                f'`loss_type` "simple" does not train a variance of type {self.variance_type!r}; use "hybrid" or '
                '"vlb", or a fixed `variance_type`.'
            )


@dataclass(kw_only=True)
class NCSNSettings(UNetSettings, MonitorSettings):
    """Settings of a score network's training.

    Args:
        architecture: "unet" (diffusers' UNet2DModel, given x_t/√(1+σ²)), or the papers' RefineNets, "ncsn" and
            "ncsnv2".
        model_channels: base width of the RefineNets.
        prediction_type: what the UNet predicts, and its score is computed from; a RefineNet predicts the score.
        sigma_min: the smallest noise level, for images in [-1, 1].
        sigma_max: the largest, or "auto": the largest distance between two images of the dataset (technique 1).
        num_levels: L, or "auto": as many as keep each level within reach of the next (technique 2).
        steps_per_level: T, Langevin updates per level in sampling, for which the step size is solved (technique 4).
        sampling: the saved scheduler's: "langevin", "consistent" or "predictor_corrector".
    """

    output_dir: str = "out/digits-ncsn"
    max_train_steps: PositiveInt = 800
    learning_rate: PositiveFloat = 2e-3
    sample_steps: PositiveInt = 250
    architecture: Literal["unet", "ncsn", "ncsnv2"] = "unet"
    model_channels: PositiveInt = 32
    prediction_type: Literal["score", "epsilon", "sample", "v_prediction"] = "v_prediction"
    sigma_min: PositiveFloat = 0.02
    sigma_max: PositiveFloat | Literal["auto"] = "auto"
    num_levels: PositiveInt | Literal["auto"] = "auto"
    steps_per_level: PositiveInt = 2
    sampling: Literal["langevin", "consistent", "predictor_corrector"] = "consistent"


@dataclass(kw_only=True)
class ClassifierSettings(TrainingSettings, LabelSettings):
    """Settings of a noisy classifier's training.

    Args:
        shift_augmentation: move each image by up to this many pixels each way; its border is repeated outwards.
        augment_probability: scale, stretch and shift the images, each with this probability.
        label_smoothing: share of each label that is spread evenly over all classes, in the cross entropy.
        diffusion_model: the pipeline folder or Hub id of the diffusion model or score network to guide; gives the noise
            levels. A run on the digits without any takes out/digits-ddpm where there is one.
        num_train_timesteps: T, where there is no diffusion_model; default 1000.
        beta_schedule: the noise levels, where there is no diffusion_model; default linear.
        beta_start: of those levels, their first β.
        beta_end: of those levels, their last β.
        classification_weight: weight of the cross entropy in the loss.
        guided_denoising_weight: weight of the guided denoising loss, which trains the classifier's gradient.
        teacher: the folder or Hub id of a class-conditional model, trained with class_dropout on the same noise levels,
            from which that loss distils the gradient: what it predicts without the class, less what it predicts with;
            without a diffusion_model, it is also the one to guide, as it draws where it is told no class.
        time_sampling: "uniform", or "log-snr", which draws more of the noisy levels, where the class is decided.
        guidance_scale: the pipeline's default, also that of the samples drawn at the end.
        sample_images: images of each class drawn for `samples.png` at the end; 0 draws none.
        sample_steps: model calls per drawn image.
        judge: the folder of another classifier, of clean images, that says which classes those samples show.
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
    also_read: ClassVar[Mapping[str, Sequence[str]]] = {"init_from": ["--init_classifier"]}

    output_dir: str = "out/digits-classifier-guided"
    max_train_steps: PositiveInt = 800
    learning_rate: PositiveFloat = 2e-3
    shift_augmentation: NonNegativeInt = 0
    augment_probability: ClosedUnitInterval = 0.0
    label_smoothing: ClosedUnitInterval = 0.0
    diffusion_model: str | None = None
    num_train_timesteps: PositiveInt | None = None
    beta_schedule: BetaSchedule | None = None
    beta_start: PositiveFloat | None = None
    beta_end: PositiveFloat | None = None
    classification_weight: NonNegativeFloat = 1.0
    guided_denoising_weight: NonNegativeFloat = 0.0
    teacher: str | None = None
    time_sampling: Literal["uniform", "log-snr"] = "uniform"
    guidance_scale: NonNegativeFloat = 8.0
    sample_images: NonNegativeInt = 10
    sample_steps: PositiveInt = 50
    judge: str | None = None
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
        if self.init_from and (given := self.given(ARCHITECTURE)):
            raise ValueError(f"`init_from` already says {', '.join(given)}, got {given}; leave these out, or it.")
        if self.guided_denoising_weight and not (self.diffusion_model or self.teacher):
            raise ValueError(
                f"`guided_denoising_weight` needs a `diffusion_model`, got {self.guided_denoising_weight} and none; "
                "name its folder."
            )
        if self.teacher and not self.guided_denoising_weight:
            raise ValueError(
                f"`teacher` needs a `guided_denoising_weight`, got {self.teacher!r} without; give a positive weight."
            )
        if not self.guided_denoising_weight and not self.classification_weight:
            raise ValueError("`classification_weight` or `guided_denoising_weight` must be positive, got 0 for both.")

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """The settings of these names that are not left to their defaults."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(kw_only=True)
class GuidedSettings(LabelSettings):
    """Settings of a guided pipeline's training, a diffusion model's and then its classifier's; the rest is chosen.

    Args:
        time_budget: how long it may take, like 15m or 1h30m; sizes and steps are chosen for it by the measured speed.
        augment_probability: of each change of the images that the diffusion model is told of; unless it is 0, the
            classifier's images are scaled, stretched and shifted, each with a probability of a half.
        block_out_channels: widths of the diffusion model's UNet, one per level.
        train_batch_size: images per process and training step.
        max_train_steps: training steps of the diffusion model.
        classifier_steps: training steps of the classifier.
        learning_rate: the peak of the diffusion model's.
        mixed_precision: the precision of the forward pass (quote "no" in YAML).
        guidance_scale: the pipeline's default.
        sample_steps: model calls per drawn image.
        judge: the folder of another classifier, of clean images, that says which classes the samples show.
    """

    output_dir: str = "out/digits-guided"
    time_budget: str = "15m"
    balance_classes: bool | None = None  # type: ignore[assignment]  # chosen
    augment_probability: ClosedUnitInterval | None = None
    block_out_channels: tuple[PositiveInt, ...] | None = None
    train_batch_size: PositiveInt | None = None
    max_train_steps: PositiveInt | None = None
    classifier_steps: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    guidance_scale: NonNegativeFloat = 10.0
    sample_steps: PositiveInt = 50
    judge: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seconds  # noqa: B018 (refuses a budget that is none)

    @property
    def seconds(self) -> int:
        """The time budget.

        Raises:
            ValueError: where it is none.
        """
        found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.time_budget)
        hours, minutes, seconds = (int(number or 0) for number in found.groups()) if found else (0, 0, 0)
        total = 3600 * hours + 60 * minutes + seconds
        if total < LEAST_SECONDS:
            raise ValueError(
                f"`time_budget` must be a time of at least {LEAST_SECONDS}s, like 15m or 1h30m, got "
                f"{self.time_budget!r}."
            )
        return total


SETTINGS: dict[str, type[RunSettings]] = {
    "guided": GuidedSettings,
    "ddpm": DDPMSettings,
    "classifier": ClassifierSettings,
    "ncsn": NCSNSettings,
}
