"""Training of a classifier-guided pipeline from a set of labelled pictures: a diffusion model, then its classifier.

Sizes and steps are chosen once, in `plan.json`, so that a run that was stopped goes on as it began: the same command
leaves what is done and resumes the rest.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..data.files import place_file
from ..data.labelled import median_side
from ..data.process import on_main
from . import train_classifier, train_ddpm
from .batches import choose_flips, load_training_data
from .card import find_repository
from .config import as_json
from .plan import Choice, choose, choose_resolution, classifier_settings, unet_settings, with_choices
from .settings import ClassifierSettings, DDPMSettings, GuidedSettings, LabelSettings

PLAN, DIFFUSION = "plan.json", "diffusion"  # file and folder in a run's
INDEX = "model_index.json"
MAY_CHANGE = {"output_dir", "report_to", "push_to_hub", "hub_model_id", "streaming"}
CHECKPOINTS, VALIDATIONS = 10, 5  # of a stage
GUIDE_AUGMENTED = 0.5  # probability of each change of the classifier's images, where the diffusion model's change


def run(settings: GuidedSettings) -> None:
    """Trains, or goes on training, the pipeline of the settings."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    folder = Path(settings.output_dir)
    on_main(state, lambda: find_repository(settings))
    settings = plan(settings, state)
    if (folder / INDEX).is_file():
        state.print(f"{folder} is trained already; draw from it, or train another in another `--output_dir`.")
        return
    if not (folder / DIFFUSION / INDEX).is_file():
        state.print("\nFirst, the diffusion model.")
        train_ddpm.run(diffusion_settings(settings))
        state.wait_for_everyone()
    state.print("\nSecond, the classifier that guides it.")
    train_classifier.run(guide_settings(settings), recipe=settings)


def plan(settings: GuidedSettings, state: PartialState) -> GuidedSettings:
    """The settings with everything chosen: as `plan.json` has it, or else anew, which is then told and kept.

    Raises:
        ValueError: when the folder is of a run of other settings.
    """
    path = Path(settings.output_dir, PLAN)
    given = as_json(settings)
    kept = on_main(state, lambda: json.loads(path.read_text()) if path.is_file() else None)
    if kept is not None:
        differ = [
            f"`{name}` was {was!r}, is {given.get(name)!r}"
            for name, was in kept["given"].items()
            if name not in MAY_CHANGE and given.get(name) != was
        ]
        if differ:
            raise ValueError(
                f"`output_dir` must be of the same run, or new, got {settings.output_dir!r}, where "
                f"{', '.join(differ)}; give the same settings, or another folder."
            )
        return with_choices(settings, [Choice(name, value, "") for name, value in kept["chosen"].items()])
    state.print(f"Choosing for {settings.time_budget} on this machine; each is a flag.")
    choices = choose_all(settings, state)
    content = {"given": given, "chosen": {choice.name: choice.value for choice in choices}}
    chosen = on_main(state, lambda: keep(path, content, choices))
    return with_choices(settings, [Choice(name, value, "") for name, value in chosen.items()])


def choose_all(settings: GuidedSettings, state: PartialState) -> list[Choice]:
    """What is not given; every process measures, so that they slow one another as they will in training."""
    choices = []
    if settings.resolution is None:
        side = median_side(
            settings.dataset, image_column=settings.image_column, config_name=settings.dataset_config_name
        )
        choices.append(choose_resolution(settings, side, state.device))
        settings = with_choices(settings, choices)
    data, _ = load_training_data(settings, settings.label_column)
    choose_flips(settings, data)  # refuses classes that are not there, before the plan is kept
    torch.manual_seed(settings.seed)
    return choices + choose(settings, data, state.device, state.num_processes)


def keep(path: Path, content: dict[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
    """Tells the choices, writes the plan, and gives the choices as it has them."""
    print(*choices, sep="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2)
    place_file(path, text.encode())
    return json.loads(text)["chosen"]


def common(settings: GuidedSettings, steps: int) -> dict[str, Any]:
    """What both stages are told."""
    names = {field.name for field in fields(LabelSettings)} | {"train_batch_size", "mixed_precision", "sample_steps"}
    every = max(1, steps // CHECKPOINTS)
    return {name: getattr(settings, name) for name in names} | {
        "max_train_steps": steps,
        "lr_warmup_steps": min(100, steps // 10),
        "ema_decay": round(1 - min(0.05, 20 / steps), 6),
        "checkpointing_steps": every,
        "checkpoints_total_limit": 2,
        "resume_from_checkpoint": "latest",
    }


def diffusion_settings(settings: GuidedSettings) -> DDPMSettings:
    """Those of the first stage."""
    assert settings.max_train_steps
    assert settings.block_out_channels
    told = common(settings, settings.max_train_steps) | {
        "output_dir": str(Path(settings.output_dir, DIFFUSION)),
        "push_to_hub": False,
        "learning_rate": settings.learning_rate,
        "validation_steps": max(1, settings.max_train_steps // VALIDATIONS),  # to see when copies set in
        "augment_probability": settings.augment_probability,
        "prediction_type": "v_prediction",
        "snr_gamma": 5.0,
    }
    return DDPMSettings(**told, **unet_settings(settings.block_out_channels))


def guide_settings(settings: GuidedSettings) -> ClassifierSettings:
    """Those of the second stage."""
    assert settings.classifier_steps
    assert settings.resolution
    told = common(settings, settings.classifier_steps) | {
        "diffusion_model": str(Path(settings.output_dir, DIFFUSION)),
        "guidance_scale": settings.guidance_scale,
        "judge": settings.judge,
        "shift_augmentation": settings.resolution // 16,
        "augment_probability": GUIDE_AUGMENTED if settings.augment_probability else 0.0,
        "label_smoothing": 0.05,
        "dropout": 0.1,
        "adam_weight_decay": 0.05,
    }
    return ClassifierSettings(**told, **classifier_settings(settings.resolution))
