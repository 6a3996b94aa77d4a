"""Checkpoints of the original NCSN and NCSNv2 (the repositories ermongroup/ncsn and ncsnv2) as hfdiff models.

The originals number their noise levels from the largest σ to the smallest; hfdiff's timesteps grow with the noise. So
the rows of NCSN's conditional normalisations are turned round, and so are NCSNv2's levels.
"""

import re
from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

import torch
import yaml
from torch import Tensor

from ..models.ncsn import NCSNModel
from ..models.ncsnv2 import NCSNv2Model
from .checkpoint import read_checkpoint

# By how many levels a network has: their widths, and the original's names of the encoder's levels and decoder's blocks.
ARCHITECTURES: dict[int, tuple[tuple[int, ...], list[str], list[str]]] = {
    4: ((1, 2, 2, 2), ["1", "2", "3", "4"], ["1", "2", "3", "4"]),
    5: ((1, 2, 2, 4, 4), ["1", "2", "3", "4", "5"], ["1", "2", "3", "4", "5"]),
    6: ((1, 2, 2, 2, 4, 4), ["1", "2", "3", "31", "4", "5"], ["1", "2", "31", "3", "4", "5"]),
}
DILATED = (2, 4)  # of every network's last two levels
MOVING_AVERAGE = 4  # its place in NCSNv2's [state dict, optimizer, epoch, step, moving average]
BUFFERS = re.compile(r"sigmas|.*\.weight_[uv]")  # what a moving average, of parameters, does not hold


def load_model(
    checkpoint: str | PathLike[str] | Mapping[str, Tensor] | list[Any],
    config: str | PathLike[str] | Mapping[str, Any] | object,
    version: int = 2,
    ema: bool = True,
) -> NCSNModel | NCSNv2Model:
    """Converts a checkpoint of the original NCSN or NCSNv2; its scores stay, its labels become L - 1 - label.

    Args:
        checkpoint: a state dict, what the original's training saves (a list that begins with one), or the path of
            either, which is read with `weights_only=True`. The depth of the network is read from its names.
        config: the original's configuration, with `data` and `model`: nested mappings or namespaces, or the path of its
            YAML file. What NCSN's older files do not name is as it was there: InstanceNorm++, ELU, geometric levels.
        version: 1 for NCSN, conditioned on the level (`CondRefineNetDilated`, and ncsnv2's `NCSN`); 2 for NCSNv2, its
            deeper and its deepest form.
        ema: take the moving average of the weights, where the checkpoint is a list that could hold one: a state dict is
            what it is, and so is NCSN's [state dict, optimizer].

    Returns:
        The model, in evaluation mode, float32 on the CPU. A spectral normalisation is folded into the weights.

    Raises:
        ValueError: for a checkpoint, configuration and version that do not fit each other, or no moving average.
    """
    if version not in (1, 2):
        raise ValueError(f"`version` must be 1 for NCSN or 2 for NCSNv2, got {version!r}.")
    settings = read_config(config)
    state = _fold_spectral_norm(_read_state(checkpoint, version, ema))
    conditional = any(name.endswith(".embed.weight") for name in state)
    if conditional != (version == 1):
        raise ValueError(
            f"`version` must be {1 if conditional else 2} for this checkpoint, whose normalisations "
            f"{'depend' if conditional else 'do not depend'} on the noise level, got {version}."
        )
    model = (NCSNModel if conditional else NCSNv2Model)(**_model_arguments(settings, _count_levels(state)))
    _check_sigmas(state.pop("sigmas", model.sigmas.flip(0)), model.sigmas)
    model.net.load_state_dict(_rename(state, model.net.state_dict()))
    return model.eval()


def _check_sigmas(sigmas: Tensor, expected: Tensor) -> None:
    """Refuses a checkpoint's levels, descending, that are not the configuration's, ascending."""
    if sigmas.shape != expected.shape or not torch.allclose(sigmas.flip(0), expected, rtol=1e-4, atol=0):
        raise ValueError(
            f"`config` must name the checkpoint's {len(sigmas)} noise levels from {float(sigmas[0]):g} to "
            f"{float(sigmas[-1]):g}, got {len(expected)} from {float(expected[-1]):g} to {float(expected[0]):g}; take "
            "the configuration it was trained with."
        )


# --- the checkpoint --------------------------------------------------------------------------------------------------


def _read_state(checkpoint: Any, version: int, ema: bool) -> dict[str, Tensor]:
    """The weights by the original's names, of the moving average or the raw ones."""
    if isinstance(checkpoint, str | PathLike):
        checkpoint = read_checkpoint(checkpoint)
    if isinstance(checkpoint, Mapping):
        return _bare(checkpoint)
    if not isinstance(checkpoint, list | tuple) or not checkpoint or not isinstance(checkpoint[0], Mapping):
        raise ValueError(
            "`checkpoint` must be a state dict, a list that begins with one, or the path of either, got "
            f"{type(checkpoint).__name__}."
        )
    raw = _bare(checkpoint[0])
    if not ema or (version == 1 and len(checkpoint) == 2):
        return raw
    if len(checkpoint) <= MOVING_AVERAGE:
        raise ValueError(
            f"`ema` needs a checkpoint with a moving average, entry {MOVING_AVERAGE} of its list, got "
            f"{len(checkpoint)} entries; pass `ema=False` for the raw weights."
        )
    average = _bare(checkpoint[MOVING_AVERAGE])
    _refuse(
        "`checkpoint` lacks the moving average of", {name for name in raw if not BUFFERS.fullmatch(name)} - {*average}
    )
    return {**raw, **average}


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefix of `DataParallel`."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def _fold_spectral_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divides each weight that is spectrally normalised by its largest singular value u·Wv, as evaluation does."""
    folded = {name: value for name, value in state.items() if not re.search(r"\.weight_(orig|u|v)$", name)}
    for name in state.keys() - folded.keys():
        if name.endswith("_orig"):
            base = name.removesuffix("_orig")
            weight, u, v = (state[base + end] for end in ("_orig", "_u", "_v"))
            folded[base] = weight / (u @ weight.flatten(1) @ v)
    return folded


def _count_levels(state: Collection[str]) -> int:
    count = len({match[1] for name in state if (match := re.match(r"res(\d+)\.", name))})
    if count not in ARCHITECTURES:
        raise ValueError(
            f"`checkpoint` must be a network of {tuple(ARCHITECTURES)} levels, `res1.` and so on, got {count} of them."
        )
    return count


def _original_name(name: str, num_levels: int) -> str:
    """The original's name of one of `RefineNet`'s parameters."""
    _, levels, blocks = ARCHITECTURES[num_levels]
    name = re.sub(r"^conv_(in|out)", lambda match: {"in": "begin_conv", "out": "end_conv"}[match[1]], name)
    name = re.sub(r"^norm_out", "normalizer", name)
    name = re.sub(r"^stages\.(\d)", lambda match: f"res{levels[int(match[1])]}", name)
    name = re.sub(r"^refine_blocks\.(\d)", lambda match: f"refine{blocks[int(match[1])]}", name)
    return re.sub(  # the units of two layers count from 1: 1_1, 1_2, 2_1, ...
        r"((?:adapt_convs\.\d|output_convs)\.)(norm|conv)s\.(\d)",
        lambda match: f"{match[1]}{int(match[3]) // 2 + 1}_{int(match[3]) % 2 + 1}_{match[2]}",
        name,
    )


def _rename(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict by `RefineNet`'s names, with the levels of its conditional normalisations in our order."""
    num_levels = _count_levels(state)
    names = {_original_name(name, num_levels): name for name in wanted}
    _refuse("`checkpoint` lacks", names.keys() - state.keys())
    _refuse("`checkpoint` has, beyond the network's,", state.keys() - names.keys())
    shapes = {
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[ours].shape)}"
        for name, ours in names.items()
        if state[name].shape != wanted[ours].shape
    }
    _refuse("`checkpoint` differs from `config` (`ngf`, `channels`, `num_classes`) in", shapes)
    return {
        ours: state[name].flip(0) if name.endswith(".embed.weight") else state[name] for name, ours in names.items()
    }


def _refuse(problem: str, names: Collection[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:8])
        raise ValueError(f"{problem} {len(names)} entries: {shown}{', ...' if len(names) > 8 else ''}.")


# --- the configuration -----------------------------------------------------------------------------------------------


class _ConfigLoader(yaml.SafeLoader):
    """Reads the namespaces that the original writes into its YAML, and skips any other Python object."""


def _namespace(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_ConfigLoader.add_constructor("tag:yaml.org,2002:python/object:argparse.Namespace", _namespace)
_ConfigLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, tag, node: None)


def read_config(config: Any) -> dict[str, Any]:
    """The original's configuration as nested dicts, from any form that [`load_model`] takes.

    Raises:
        ValueError: where the file cannot be read, or `data` or `model` is missing.
    """
    if isinstance(config, str | PathLike):
        try:
            with open(config) as file:
                config = yaml.load(file, Loader=_ConfigLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"`config` must be the path of a YAML file, got {str(config)!r}: {reason}.") from error
    settings = _as_dict(config)
    if not isinstance(settings, dict) or not all(isinstance(settings.get(part), dict) for part in ("data", "model")):
        raise ValueError(
            "`config` must have the parts `data` and `model`, as mappings or namespaces, or be the path of a YAML file "
            f"that has, got {config!r:.80}."
        )
    return settings


def _as_dict(value: Any) -> Any:
    if not isinstance(value, Mapping):
        value = getattr(value, "__dict__", value)
    return {key: _as_dict(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _model_arguments(settings: dict[str, Any], count: int) -> dict[str, Any]:
    """The arguments of our model with so many levels of resolution."""
    data, model = settings["data"], settings["model"]
    needed = {"data": ("image_size", "channels"), "model": ("ngf", "num_classes", "sigma_begin", "sigma_end")}
    lacking = [f"{part}.{key}" for part, keys in needed.items() for key in keys if key not in settings[part]]
    _refuse("`config` lacks", lacking)
    for key, choices in (("normalization", ("InstanceNorm++",)), ("sigma_dist", ("geometric", "uniform"))):
        if (value := model.get(key, choices[0])) not in choices:
            raise ValueError(f"`config`'s `model.{key}` must be one of {choices}, got {value!r}.")
    sigma_min, sigma_max, num_levels = float(model["sigma_end"]), float(model["sigma_begin"]), model["num_classes"]
    uniform = model.get("sigma_dist") == "uniform"
    return {
        "sample_size": data["image_size"],
        "in_channels": data["channels"],
        "model_channels": model["ngf"],
        "channel_mult": ARCHITECTURES[count][0],
        "dilations": (*[1] * (count - len(DILATED)), *DILATED),
        "num_levels": num_levels,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "trained_sigmas": torch.linspace(sigma_min, sigma_max, num_levels, dtype=torch.float64).tolist()
        if uniform
        else None,
        "nonlinearity": model.get("nonlinearity", "elu").lower(),
        "rescaled": data.get("rescaled", False),
        "logit_transform": data.get("logit_transform", False),
    }
