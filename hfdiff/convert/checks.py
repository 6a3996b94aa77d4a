"""What the weights of an ADM network say of its architecture, to find the flag that is wrong.

All that shapes can tell is read; head counts and the order of qkv rows they cannot.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

LAYER = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(in_layers\.2|qkv|op|conv)\.weight")
LAST_BIASES = ("out.2.bias", "out.3.bias", "out.2.c_proj.bias")  # of the pools
SHOWN = 4  # names of each kind in a message
OTHERS = {  # names that tell what another checkpoint is
    r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|.*transformer_blocks\.": (
        "a text-conditioned latent diffusion model, such as Stable Diffusion, which diffusers' "
        "`StableDiffusionPipeline.from_single_file` opens"
    ),
    r"down_blocks\.|conv_in\.": "a network by diffusers' names, which its own `from_pretrained` opens",
    r"(module\.)?(begin_conv|refine1\.)": "an NCSN, which `hfdiff convert ncsn` and `ncsnv2` open",
    r"param_groups$": "an optimizer's state; take the checkpoint named model*.pt or ema_*.pt beside it",
    r"state_dict$": "a training checkpoint that holds a state dict under `state_dict`; save that one alone",
}

Reading = dict[str, Any]  # entries of a network's config


def read_unet(state: Mapping[str, Tensor]) -> Reading:
    """What the weights say of a UNet's config.

    Raises:
        ValueError: for weights of anything else.
    """
    needed = {"input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight", "output_blocks.0.0.in_layers.2.weight"}
    if not needed <= state.keys():
        raise ValueError(_what_it_is(state, "a UNet", needed - state.keys()))
    reading = _read_common(state)
    blocks = _blocks(state, "output")
    levels = 1 + sum(block[-1][0] in ("conv", "in_layers.2") for block in blocks if len(block) > 1)
    if levels > 1:
        reading["resblock_updown"] = not any("conv" in dict(block) for block in blocks)
    reading["out_channels"] = state["out.2.weight"].shape[0]
    label_emb = state.get("label_emb.weight")
    reading["num_class_embeds"] = None if label_emb is None else label_emb.shape[0]
    reading["num_res_blocks"] = len(blocks) // levels - 1
    return {**reading, **_read_levels(blocks[:: len(blocks) // levels][:levels][::-1], reading["model_channels"])}


def read_classifier(state: Mapping[str, Tensor], num_res_blocks: int, num_levels: int) -> Reading:
    """What the weights say of a classifier's config.

    Args:
        state: the weights.
        num_res_blocks: of the flags, where the weights do not tell a block that halves the size from the others.
        num_levels: of the flags, likewise.

    Raises:
        ValueError: for weights of anything else.
    """
    needed = {"input_blocks.0.0.weight", "time_embed.0.weight", "middle_block.1.qkv.weight"}
    if not needed <= state.keys() or any(name.startswith("output_blocks.") for name in state):
        raise ValueError(_what_it_is(state, "a classifier", needed - state.keys()))
    reading = _read_common(state)
    blocks = _blocks(state, "input")  # all but the first, a convolution
    downs = [index for index, block in enumerate(blocks) if block[0][0] == "op"]
    last = state.get("out.3.weight")
    outputs = [value.shape[0] for name, value in state.items() if name in LAST_BIASES]
    reading["num_classes"] = outputs[-1] if outputs else 0
    if last is not None:
        reading["pool"] = "adaptive" if last.ndim == 4 else "spatial_v2"
    else:
        reading["pool"] = "attention" if "out.2.c_proj.weight" in state else "spatial"
    depth, levels = num_res_blocks, num_levels
    if levels > 1:
        reading["resblock_updown"] = not downs
    if downs:
        depth, levels = downs[0], len(downs) + 1
    elif (len(blocks) + 1) % levels == 0:
        depth = (len(blocks) + 1) // levels - 1
    elif (len(blocks) + 1) % (depth + 1) == 0:
        levels = (len(blocks) + 1) // (depth + 1)
    else:
        return reading
    reading["num_res_blocks"] = depth
    reading |= _read_levels(blocks[:: depth + 1][:levels], reading["model_channels"])
    positions = state.get("out.2.positional_embedding")
    if positions is not None:
        reading["sample_size"] = math.isqrt(positions.shape[1] - 1) * 2 ** (levels - 1)
    return reading


def _read_common(state: Mapping[str, Tensor]) -> Reading:
    width = state["time_embed.0.weight"].shape[1]
    emb, norm = (state.get(f"middle_block.0.{name}.weight") for name in ("emb_layers.1", "out_layers.0"))
    reading: Reading = {"in_channels": state["input_blocks.0.0.weight"].shape[1], "model_channels": width}
    if emb is not None and norm is not None:
        reading["use_scale_shift_norm"] = emb.shape[0] == 2 * norm.shape[0]
    return reading


def _blocks(state: Mapping[str, Tensor], side: str) -> list[list[tuple[str, int]]]:
    """The encoder's or decoder's blocks as their layers: each one's kind, by a name in it, and its width."""
    found = {}
    for name, value in state.items():
        if (match := LAYER.fullmatch(name)) and match[1] == side:
            found[int(match[2]), int(match[3])] = (match[4], value.shape[0])
    blocks: dict[int, list[tuple[str, int]]] = {}
    for block, layer in sorted(found):
        blocks.setdefault(block, []).append(found[block, layer])
    return [*blocks.values()]


def _read_levels(firsts: list[list[tuple[str, int]]], model_channels: int) -> Reading:
    """Multipliers and attention of the levels, from the first block of each."""
    mults = [block[0][1] / model_channels for block in firsts]
    return {
        "channel_mult": tuple(int(mult) if mult.is_integer() else mult for mult in mults),
        "attention_downsamples": tuple(2**level for level, block in enumerate(firsts) if "qkv" in dict(block)),
    }


def _what_it_is(state: Mapping[str, Any], wanted: str, lacking: Collection[str]) -> str:
    """The message for a checkpoint of something else."""
    kinds = [kind for pattern, kind in OTHERS.items() if any(re.match(pattern, str(name)) for name in state)]
    if kinds:
        kind = kinds[0]
    elif "time_embed.0.weight" in state:
        is_unet = any(name.startswith("output_blocks.") for name in state)
        kind = "the UNet" if is_unet else "the classifier"
    else:
        kind = f"something else: it lacks {_some(lacking)}"
    return f"The checkpoint must be {wanted} of guided-diffusion or improved-diffusion, and is {kind}."


def wrong_flags(reading: Reading, config: Reading, names: Mapping[str, str]) -> list[str]:
    """The config's entries that the weights contradict, each as "flag=value of the weights, not value of the flag"."""
    wrong = []
    for key, value in reading.items():
        if key in config and config[key] != value:
            theirs, ours = (_as_flag(key, entry, config) for entry in (value, config[key]))
            wrong.append(f"{names.get(key, key)}={theirs}, not {ours}")
    return wrong


def _as_flag(key: str, value: Any, config: Reading) -> Any:
    """A config's entry as the original's flag of it has it."""
    if key == "attention_downsamples":
        value = [config["sample_size"] // factor for factor in value]
    elif key == "num_class_embeds":
        return value is not None
    elif key == "out_channels":
        return value == 2 * config["in_channels"]
    return ",".join(str(entry) for entry in value) if isinstance(value, tuple | list) else value


def check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], wrong: list[str]) -> None:
    """Refuses weights whose names or shapes are not those of the network that the flags describe.

    Args:
        state: the weights.
        expected: those of the network.
        wrong: flags that the weights contradict.

    Raises:
        ValueError: with the names, and the flags that seem wrong.
    """
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    lists = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if not lists:
        return
    raise ValueError(f"`flags` do not fit the weights: of these, {', '.join(lists)}. {guess(wrong)}")


def guess(wrong: list[str]) -> str:
    """A sentence that names the flags that seem wrong."""
    return f"The weights say {'; '.join(wrong)}." if wrong else "Compare the flags with those of the training."


def _some(names: Collection[str]) -> str:
    shown = list(names)[:SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN else "")
