"""Settings of a training: a dataclass, filled from its defaults, then a YAML recipe, then flags.

A training subclasses [`RunSettings`] or [`TrainingSettings`] with fields of its own and calls [`parse_settings`]. Every
field is a flag and a key of the recipe, under diffusers' name where its example scripts have one; its line under
`Args:` is the help.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

LearningRateSchedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


@dataclass(kw_only=True)
class RunSettings:
    """What every training is told of its pictures and of where its results go.

    Args:
        dataset_name: a Hub id, a local parquet or arrow file, a local folder, or "digits", scikit-learn's 8x8 digits,
            which need no network and are the default.
        dataset_config_name: the dataset's configuration, where it has several.
        train_data_dir: a local folder of parquet files, or of images in one folder per class; instead of dataset_name.
        validation_data: a dataset, as dataset_name, whose split "test", or the whole file, is measured on; default: the
            digits' own for the digits, otherwise none.
        hold_out: share of the training images to keep for measuring, where there is no validation_data; one of each so
            many in a row, so that a set sorted by class keeps some of each. Default: none, or what `guided` chooses.
        image_column: the dataset's column of images.
        resolution: resize the images' shorter side to this, then crop a square; default: the images' own size.
        labels_from_names: the classes are what the files of a folder of images are called before the first "_", as in
            guided-diffusion's class_name.png.
        random_flip: mirror images left and right, every second time.
        streaming: decode images for each batch instead of once into memory; default: where they take over 2 GiB.
        output_dir: where checkpoints, `log.jsonl` and the trained model go.
        seed: seed of the weights and of every batch.
        report_to: a tracker of accelerate's, such as "tensorboard", which writes to `logs` in output_dir and is the
            default where it is installed, or "none".
        push_to_hub: publish the result on the Hub.
        hub_model_id: the repository to publish it in; default: named like output_dir.
    """

    also_read: ClassVar[Mapping[str, Sequence[str]]] = {}  # further flags of a setting, of earlier versions

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    validation_data: str | None = None
    hold_out: ClosedUnitInterval | None = None
    image_column: str = "image"
    resolution: PositiveInt | None = None
    labels_from_names: bool = False
    random_flip: bool = False
    streaming: bool | None = None
    output_dir: str = "output"
    seed: NonNegativeInt = 0
    report_to: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_data_dir:
            raise ValueError(
                f"Expected one of `dataset_name` and `train_data_dir`, got {self.dataset_name!r} and "
                f"{self.train_data_dir!r}; leave one out."
            )
        if self.hold_out and self.validation_data:
            raise ValueError(
                f"`hold_out` must be 0 with `validation_data`, got {self.hold_out} and {self.validation_data!r}; "
                "leave one out."
            )

    @property
    def dataset(self) -> str:
        """The dataset to train on, as [`~hfdiff.data.labelled.load_images`] takes it."""
        return self.train_data_dir or self.dataset_name or "digits"


@dataclass(kw_only=True)
class TrainingSettings(RunSettings):
    """What the training of one network is told besides.

    Args:
        center_crop: crop that square from the image's centre; without it, from another place in each batch.
        train_batch_size: images per process and backward pass.
        gradient_accumulation_steps: backward passes per training step.
        max_train_steps: training steps, that is, updates of the weights.
        num_epochs: passes over the dataset, instead of max_train_steps.
        learning_rate: the peak, after the warmup.
        lr_scheduler: course of the learning rate from there to the last step.
        lr_warmup_steps: training steps over which the learning rate rises from 0.
        adam_weight_decay: decoupled weight decay of AdamW.
        max_grad_norm: the gradient is scaled down to this norm.
        use_ema: keep an exponential moving average of the weights, and save that at the end.
        ema_decay: its decay per training step, approached as (1 + n) / (10 + n) in the first n steps.
        average_snapshots: how often in the run to write down two further averages of the weights, of which
            `hfdiff average` makes one of any length afterwards; each time takes twice the model's size on the disk. 0
            keeps none.
        mixed_precision: the precision of the forward pass (quote "no" in YAML); "auto" is bf16 where the hardware
            computes in it, else float32; default: accelerate's configuration.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        checkpointing_steps: training steps between two checkpoints; there is one at the end, too.
        checkpoints_total_limit: checkpoints to keep, the newest; default: all.
        resume_from_checkpoint: "latest", or the name of a checkpoint in output_dir; without any, "latest" begins anew.
        logging_steps: training steps between two lines of `log.jsonl`.
        validation_steps: training steps between two validations; there is one at the end, too.
        init_from: the folder or Hub id of a model whose weights the training starts from, for fine-tuning; what it
            says of itself (its architecture, noise levels and the like) need not be given.
    """

    # What a resumed run may give anew: nothing of it reaches the weights.
    may_change: ClassVar[frozenset[str]] = frozenset(
        {
            "validation_data",
            "streaming",
            "output_dir",
            "gradient_checkpointing",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "resume_from_checkpoint",
            "logging_steps",
            "validation_steps",
            "report_to",
            "push_to_hub",
            "hub_model_id",
        }
    )

    center_crop: bool = True
    train_batch_size: PositiveInt = 64
    gradient_accumulation_steps: PositiveInt = 1
    max_train_steps: PositiveInt = 2000
    num_epochs: PositiveInt | None = None
    learning_rate: PositiveFloat = 1e-3
    lr_scheduler: LearningRateSchedule = "cosine"
    lr_warmup_steps: NonNegativeInt = 100
    adam_weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    use_ema: bool = True
    ema_decay: ClosedUnitInterval = 0.999
    average_snapshots: NonNegativeInt = 0
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = None
    gradient_checkpointing: bool = False
    checkpointing_steps: PositiveInt = 500
    checkpoints_total_limit: PositiveInt | None = None
    resume_from_checkpoint: str | None = None
    logging_steps: PositiveInt = 50
    validation_steps: PositiveInt | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.center_crop and self.resolution is None:
            raise ValueError("`center_crop` can be off only with a `resolution` to crop to, got none; give one.")


Settings = TypeVar("Settings", bound=RunSettings)


def as_json(settings: RunSettings) -> dict[str, Any]:
    """Settings as JSON has them, which knows no tuples."""
    return json.loads(json.dumps(asdict(settings)))


def parse_settings(
    cls: type[Settings], argv: Sequence[str] | None = None, description: str = "", name: str | None = None
) -> Settings:
    """Reads a script's settings from its flags and the recipe they name, and ends the process on a mistake.

    Besides the fields of `cls` there are `--config`, a YAML recipe, over which flags win wherever they stand, and
    `--dry_run`, which prints the settings as a recipe and ends the process.

    Args:
        cls: the settings' dataclass.
        argv: the flags; default: those of the process.
        description: of the training, for `--help`.
        name: of the command, for `--help` and errors; default: that of the process.
    """
    parser = _make_parser(cls, description, name)
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--config", action="append", default=[])
    found, flags = recipes.parse_known_args(argv)
    values = parser.parse_args([*(f"--config={recipe}" for recipe in found.config), *flags])
    values.pop("config")
    dry_run = values.pop("dry_run")
    try:
        settings = cls(**_plain(values.as_dict()))
    except ValueError as error:
        parser.error(str(error))
    if dry_run:
        print(parser.dump(values, skip_unset=False), end="")
        parser.exit()
    return settings


def _plain(value: Any) -> Any:
    """A parsed value without jsonargparse's subclasses of numbers, which checkpoints could not hold."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_plain(entry) for entry in value)
    kinds = [kind for kind in (bool, int, float) if isinstance(value, kind)]
    return kinds[0](value) if kinds else value


def _make_parser(cls: type[RunSettings], description: str, name: str | None) -> ArgumentParser:
    usage = "%(prog)s [--config recipe.yaml] [--setting value ...]"
    parser = ArgumentParser(prog=name, description=description, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML recipe; flags win over it.")
    parser.add_argument("--dry_run", action="store_true", help="Print the settings as a recipe and exit.")
    docs = {
        param.arg_name: param.description
        for base in cls.__mro__
        for param in parse_docstring(base.__doc__ or "").params
    }
    hints = get_type_hints(cls)
    for field in fields(cls):
        kind: dict[str, Any] = {"type": hints[field.name]}
        if hints[field.name] is bool:
            kind = {"action": ActionYesNo, "nargs": "?"}
        flags = [f"--{field.name}", *cls.also_read.get(field.name, ())]
        parser.add_argument(*flags, default=field.default, help=docs[field.name], **kind)
    return parser
