"""The flags of OpenAI's guided-diffusion and improved-diffusion: their names, types and defaults."""

import difflib
import shlex
from collections.abc import Mapping
from typing import Any

MODEL_DEFAULTS: dict[str, Any] = {  # of the scripts
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "learn_sigma": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
}
FUNCTION_DEFAULTS: dict[str, Any] = {  # of the function `create_model`, where they differ
    "num_heads": 1,
    "attention_resolutions": "16",
    "use_scale_shift_norm": False,
}
CLASSIFIER_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
    # which the original has no flags for
    "classifier_channel_mult": "",
    "classifier_num_head_channels": 64,
    "classifier_use_new_attention_order": False,
}
ENCODER_DEFAULTS: dict[str, Any] = {  # of the classifier's class `EncoderUNetModel`, by its own names
    "image_size": 64,
    "model_channels": 128,
    "num_res_blocks": 2,
    "attention_resolutions": "",
    "dropout": 0.0,
    "channel_mult": "1,2,4,8",
    "num_heads": 1,
    "num_head_channels": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "pool": "adaptive",
}
DIFFUSION_DEFAULTS: dict[str, Any] = {
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "sigma_small": False,
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
SAMPLING_DEFAULTS: dict[str, Any] = {"classifier_scale": 1.0, "clip_denoised": True}
DEFAULTS = {**MODEL_DEFAULTS, **CLASSIFIER_DEFAULTS, **DIFFUSION_DEFAULTS, **SAMPLING_DEFAULTS}
IMPROVED_DEFAULTS = {**DEFAULTS, "rescale_timesteps": True, "rescale_learned_sigmas": True}
SUPER_RESOLUTION = ("large_size", "small_size", "base_samples")
IGNORED = {  # of training and sampling, which say nothing of a network
    *("anneal_lr", "batch_size", "classifier_path", "data_dir", "ema_rate", "eval_interval", "fp16_scale_growth"),
    *("iterations", "log_interval", "lr", "lr_anneal_steps", "microbatch", "model_path", "noised", "num_samples"),
    *("in_channels", "num_classes", "out_channels"),  # the weights tell
    *("resume_checkpoint", "save_interval", "schedule_sampler", "use_ddim", "val_data_dir", "weight_decay"),
}
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def parse_flags(text: str, defaults: Mapping[str, Any] = DEFAULTS) -> dict[str, Any]:
    """Reads flags as they stand in the originals' READMEs, with the scripts' defaults for the others.

    Args:
        text: "--image_size 64 --learn_sigma True"; the last one of a name counts. Flags of training and sampling are
            passed over.
        defaults: `DEFAULTS`, or `IMPROVED_DEFAULTS` for improved-diffusion's.

    Raises:
        ValueError: for an unknown flag, a value of another type, or a super-resolution model's.
    """
    words = iter(_split(text))
    flags = dict(defaults)
    for word in words:
        if not word.startswith("--"):
            if word.startswith("$") or word.endswith((".py", "python")):  # of a whole command
                continue
            raise ValueError(f"`--flags` must be pairs like --image_size 64, got {word!r} where a name should stand.")
        name, separator, value = word[2:].partition("=")
        if not separator:
            value = next(words, "")
        check_name(name, (*defaults, *IGNORED))
        if name in defaults:
            flags[name] = typed(name, value, defaults[name])
    return flags


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise ValueError(f"`--flags` has a quotation mark without its other half: {text!r}.") from error


def check_name(name: str, known: tuple[str, ...]) -> None:
    """Refuses an unknown flag, and a super-resolution model's in a sentence of its own."""
    if name in SUPER_RESOLUTION:
        raise ValueError(
            f"`flags` must be of a model that draws from noise, got {name!r}, of a super-resolution model (upsampler), "
            "which is not supported; convert the model whose images it enlarges."
        )
    if name.lower() not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"`flags` must be the original's, got {name!r}; "
            f"{f'did you mean {close[0]!r}?' if close else 'check its spelling.'}"
        )


def typed(name: str, value: Any, default: Any) -> Any:
    """A value of its default's type, from text where it is text.

    Raises:
        ValueError: for text that cannot be read.
    """
    if not isinstance(value, str):
        return str(value) if isinstance(default, str) and isinstance(value, int) else value
    kind = type(default)
    if kind is bool:
        if value.lower() not in (*TRUE, *FALSE):
            raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        return value.lower() in TRUE
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"`{name}` must be of type {kind.__name__}, got {value!r}.") from error


def complete(flags: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the defaults name, each of its type."""
    return {name: typed(name, flags.get(name, default), default) for name, default in defaults.items()}
