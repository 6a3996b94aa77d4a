"""Networks of OpenAI's guided-diffusion and improved-diffusion, as modules of diffusers and hfdiff.

Their timesteps are ours: larger is noisier. Weights stay as they are; a UNet that diffusers' `UNet2DModel` can hold
becomes one, by other names and with the rows of its qkv projections sorted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor

from ..models.adm_unet import ADMUNet
from ..models.noisy_classifier import NoisyClassifier
from .checks import Reading, check_fits, guess, read_classifier, read_unet, wrong_flags
from .flags import (
    CLASSIFIER_DEFAULTS,
    DEFAULTS,
    DIFFUSION_DEFAULTS,
    ENCODER_DEFAULTS,
    FUNCTION_DEFAULTS,
    IGNORED,
    check_name,
    complete,
    parse_flags,
    typed,
)
from .unet2d import is_unet2d, unet2d_config, unet2d_state

CHANNEL_MULTS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
CLASSIFIERS_OWN = {"channel_mult", "dropout", "num_head_channels", "num_heads", "use_new_attention_order"}
UNET_NAMES = {
    "sample_size": "image_size",
    "model_channels": "num_channels",
    "attention_downsamples": "attention_resolutions",
    "num_class_embeds": "class_cond",
    "out_channels": "learn_sigma",
}
CLASSIFIER_NAMES = {
    "sample_size": "image_size",
    "model_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "attention_downsamples": "classifier_attention_resolutions",
    "use_scale_shift_norm": "classifier_use_scale_shift_norm",
    "resblock_updown": "classifier_resblock_updown",
    "pool": "classifier_pool",
}
ENCODER_NAMES = {"sample_size": "image_size", "attention_downsamples": "attention_resolutions"}

Flags = Mapping[str, Any] | str


def load_unet(state_dict: Mapping[str, Tensor], flags: Flags) -> UNet2DModel | ADMUNet:
    """Converts a UNet's weights; its outputs stay.

    Args:
        state_dict: of `UNetModel`, by the original's names. The module may keep its tensors.
        flags: by the original's names, such as `image_size`, `num_channels` and `channel_mult`, or the text of a
            command line. What a mapping does not name is as in the original's function `create_model` where that fits
            the weights, else as in its scripts; the text's defaults are the scripts'. With `rescale_timesteps` the
            module rescales the timesteps of the `diffusion_steps` itself. `use_fp16` is left to `.to(torch.float16)`.

    Returns:
        The module in evaluation mode, float32: a `UNet2DModel` of diffusers where that computes the same, else an
        [`ADMUNet`].

    Raises:
        ValueError: for unknown flags, or weights that do not fit them, with the flag that seems wrong.
    """
    named = _named(flags)
    config = unet_config(state_dict, named)
    if is_unet2d(config):
        model = _build(UNet2DModel, unet2d_config(config), unet2d_state(state_dict, config))
    else:
        model = _build(ADMUNet, config, state_dict)
    if typed("use_checkpoint", named.get("use_checkpoint", False), False):
        model.enable_gradient_checkpointing()
    return model


def load_adm_unet(state_dict: Mapping[str, Tensor], flags: Flags) -> ADMUNet:
    """Converts a UNet's weights as [`load_unet`] does, but always to the original's form, with its names."""
    return _build(ADMUNet, unet_config(state_dict, _named(flags)), state_dict)


def load_classifier(state_dict: Mapping[str, Tensor], flags: Flags) -> NoisyClassifier:
    """Converts a classifier's weights; its logits stay.

    Args:
        state_dict: of `EncoderUNetModel`, by the original's names. The module may keep its tensors.
        flags: by the original's names: `image_size`, `classifier_width`, `classifier_depth`, ..., with the scripts'
            defaults; or the arguments of `EncoderUNetModel` (`model_channels`, `pool`, ...), whose
            `attention_resolutions` are downsampling factors. Beside the first, where they do not describe a UNet too
            (`num_channels`), `channel_mult`, `num_head_channels` and `use_new_attention_order` count as well.

    Returns:
        The module in evaluation mode, float32, without class names.

    Raises:
        ValueError: for unknown flags, or weights that do not fit them, with the flag that seems wrong.
    """
    named = _named(flags)
    return _build(NoisyClassifier, classifier_config(state_dict, named), state_dict)


def _named(flags: Flags) -> dict[str, Any]:
    return parse_flags(flags) if isinstance(flags, str) else dict(flags)


def _build(kind: type[ModelMixin], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The module of these weights, in float32, without a second copy of them."""
    with torch.device("meta"):
        model = kind(**config)
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model.eval()


# --- configs ---------------------------------------------------------------------------------------------------------


def unet_config(state_dict: Mapping[str, Tensor], flags: Mapping[str, Any]) -> Reading:
    """The arguments of the [`ADMUNet`] that flags describe, checked against the weights.

    Raises:
        ValueError: for unknown flags, or weights that do not fit them.
    """
    for name in flags:
        check_name(name, (*DEFAULTS, *IGNORED))
    reading = read_unet(state_dict)
    if reading["in_channels"] == 2 * 3:
        check_name("small_size", ())
    for defaults in ({**DEFAULTS, **FUNCTION_DEFAULTS}, DEFAULTS):
        config = _unet_config(complete(flags, defaults), reading)
        if not (wrong := wrong_flags(reading, config, UNET_NAMES)):
            break
    _check(ADMUNet, config, state_dict, [*_wrong_size(reading, config), *wrong])
    return config


def _unet_config(flags: dict[str, Any], reading: Reading) -> Reading:
    mults = _channel_mult(flags)
    return {
        "sample_size": flags["image_size"],
        "in_channels": reading["in_channels"],
        "out_channels": reading["in_channels"] * (2 if flags["learn_sigma"] else 1),
        "model_channels": flags["num_channels"],
        "channel_mult": mults,
        "num_res_blocks": flags["num_res_blocks"],
        "attention_downsamples": _downsamples(flags["attention_resolutions"], flags["image_size"], len(mults)),
        "num_heads": flags["num_heads"],
        "num_head_channels": _or_none(flags["num_head_channels"]),
        "num_heads_upsample": _or_none(flags["num_heads_upsample"]),
        "use_scale_shift_norm": flags["use_scale_shift_norm"],
        "resblock_updown": flags["resblock_updown"],
        "use_new_attention_order": flags["use_new_attention_order"],
        "num_class_embeds": (reading["num_class_embeds"] or 1000) if flags["class_cond"] else None,
        "dropout": flags["dropout"],
        "timestep_scale": _timestep_scale(flags),
    }


def classifier_config(state_dict: Mapping[str, Tensor], flags: Mapping[str, Any]) -> Reading:
    """The arguments of the [`NoisyClassifier`] that flags describe, checked against the weights.

    Raises:
        ValueError: for unknown flags, or weights that do not fit them.
    """
    for name in flags:
        check_name(name, (*DEFAULTS, *ENCODER_DEFAULTS, *IGNORED))
    encoder = _encoder_arguments(flags)
    mults = _channel_mult(encoder)
    reading = read_classifier(state_dict, encoder["num_res_blocks"], len(mults))
    config = {
        "sample_size": encoder["image_size"],
        "in_channels": reading["in_channels"],
        "num_classes": flags.get("out_channels", reading["num_classes"]),
        "model_channels": encoder["model_channels"],
        "channel_mult": mults,
        "attention_downsamples": _downsamples(encoder["attention_resolutions"], encoder["image_size"], len(mults)),
        "num_head_channels": _or_none(encoder["num_head_channels"]),
        "timestep_scale": _timestep_scale(complete(flags, DIFFUSION_DEFAULTS)),
        **{name: encoder[name] for name in ("num_res_blocks", "num_heads", "pool", "dropout")},
        **{name: encoder[name] for name in ("use_scale_shift_norm", "resblock_updown", "use_new_attention_order")},
    }
    names = ENCODER_NAMES if "model_channels" in flags else CLASSIFIER_NAMES
    wrong = [*_wrong_size(reading, config), *wrong_flags(reading, config, names)]
    _check(NoisyClassifier, config, state_dict, wrong)
    return config


def _encoder_arguments(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `EncoderUNetModel`, from its own names or from those of the scripts' flags."""
    if "model_channels" in flags:
        return complete(flags, ENCODER_DEFAULTS)
    named = complete(flags, CLASSIFIER_DEFAULTS)
    arguments = {name.removeprefix("classifier_"): value for name, value in named.items()}
    arguments |= {"model_channels": arguments["width"], "num_res_blocks": arguments["depth"]}
    if "num_channels" not in flags:  # else these are the UNet's
        arguments |= {name: flags[name] for name in flags.keys() & CLASSIFIERS_OWN}
    return complete(arguments, ENCODER_DEFAULTS)


def _channel_mult(flags: Mapping[str, Any]) -> tuple[float, ...]:
    mults = flags["channel_mult"]
    if not mults:
        if flags["image_size"] not in CHANNEL_MULTS:
            raise ValueError(
                f"`channel_mult` must be given for `image_size` {flags['image_size']}: the original has its own for "
                f"{', '.join(map(str, CHANNEL_MULTS))} only."
            )
        return CHANNEL_MULTS[flags["image_size"]]
    numbers = [float(mult) for mult in (mults.split(",") if isinstance(mults, str) else mults)]
    return tuple(int(mult) if mult.is_integer() else mult for mult in numbers)


def _downsamples(resolutions: str | Sequence[int], image_size: int, levels: int) -> tuple[int, ...]:
    """The downsampling factors with attention, from the resolutions of a flag or from themselves."""
    if isinstance(resolutions, str):
        resolutions = [image_size // int(resolution) for resolution in resolutions.split(",") if resolution]
    return tuple(2**level for level in range(levels) if 2**level in resolutions)


def _timestep_scale(flags: Mapping[str, Any]) -> float:
    return 1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0


def _or_none(value: int) -> int | None:
    return None if value == -1 else value


def _wrong_size(reading: Reading, config: Reading) -> list[str]:
    """The size whose multipliers the weights have, where the flags have those of another."""
    if config["channel_mult"] == reading.get("channel_mult"):
        return []
    sizes = [size for size, mults in CHANNEL_MULTS.items() if mults == reading.get("channel_mult")]
    return [f"image_size={size}, not {config['sample_size']}" for size in sizes]


def _check(
    kind: type[ADMUNet | NoisyClassifier], config: Reading, state: Mapping[str, Tensor], wrong: list[str]
) -> None:
    """Refuses weights that are not those of the network."""
    try:
        with torch.device("meta"):
            expected = kind(**config).state_dict()
    except ValueError as error:
        raise ValueError(f"`flags` describe no network of the original's: {error} {guess(wrong)}") from error
    check_fits(state, expected, wrong)
