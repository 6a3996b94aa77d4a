"""ADM UNets as diffusers' `UNet2DModel`: which ones it can hold, with what config, and its names of their weights."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

LAYERS = {  # of residual blocks, attention and downsampling
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def is_unet2d(config: Mapping[str, Any]) -> bool:
    """Whether a `UNet2DModel` computes what an [`ADMUNet`] of this config does.

    It has one width of head for all levels, a time embedding as wide as its first level, and timesteps as they are.
    """
    return config["channel_mult"][0] == 1 and config["timestep_scale"] == 1 and len(set(_head_widths(config))) == 1


def _head_widths(config: Mapping[str, Any]) -> list[int]:
    """Channels per head of every attention on the way down, in the middle and on the way up."""
    if config["num_head_channels"] is not None:
        return [config["num_head_channels"]]
    widths = [int(mult * config["model_channels"]) for mult in config["channel_mult"]]
    attending = [width for level, width in enumerate(widths) if 2**level in config["attention_downsamples"]]
    heads = config["num_heads"]
    up = heads if config["num_heads_upsample"] is None else config["num_heads_upsample"]
    return [width // heads for width in [*attending, widths[-1]]] + [width // up for width in attending]


def unet2d_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `UNet2DModel`."""
    levels = range(len(config["channel_mult"]))
    attends = [2**level in config["attention_downsamples"] for level in levels]
    resize = "resnet" if config["resblock_updown"] else "conv"
    prefix = "Resnet{}sampleBlock2D" if config["resblock_updown"] else "{}Block2D"
    down, up = prefix.format("Down"), prefix.format("Up")
    return {
        "sample_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": tuple(int(mult * config["model_channels"]) for mult in config["channel_mult"]),
        "layers_per_block": config["num_res_blocks"],
        "down_block_types": tuple("AttnDownBlock2D" if attends[level] else down for level in levels),
        "up_block_types": tuple("AttnUpBlock2D" if attends[level] else up for level in reversed(levels)),
        "attention_head_dim": _head_widths(config)[0],
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "downsample_type": resize,
        "upsample_type": resize,
        "downsample_padding": 1,
        "resnet_time_scale_shift": "scale_shift" if config["use_scale_shift_norm"] else "default",
        "num_class_embeds": config["num_class_embeds"],
        "dropout": config["dropout"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def unet2d_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights by `UNet2DModel`'s names, with the qkv projections apart."""
    prefixes = dict(_prefixes(config))
    renamed = {}
    for name, value in state.items():
        prefix = next(prefix for prefix in _leading(name) if prefix in prefixes)
        layer, _, kind = name.removeprefix(f"{prefix}.").rpartition(".")  # kind: weight or bias
        if layer in ("qkv", "proj_out") and kind == "weight":
            value = value[:, :, 0]  # a linear layer's in diffusers, a convolution's in the original
        if layer == "qkv":
            parts = dict(zip(("to_q", "to_k", "to_v"), _split_qkv(value, config)))
        else:
            parts = {LAYERS.get(layer, layer): value}
        for part, tensor in parts.items():
            renamed[".".join(filter(None, (prefixes[prefix], part, kind)))] = tensor
    return renamed


def _leading(name: str) -> Iterator[str]:
    """The name without its last parts, the longest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _split_qkv(value: Tensor, config: Mapping[str, Any]) -> list[Tensor]:
    """Three projections from rows that are stored as [head][q, k, v] or, in the new order, as [q, k, v][head]."""
    if config["use_new_attention_order"]:
        return list(value.chunk(3))
    heads = value.unflatten(0, (-1, 3, _head_widths(config)[0]))
    return [part.flatten(0, 1) for part in heads.unbind(1)]


def _prefixes(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The original's name of each block and layer, and diffusers'."""
    yield from ENDS.items()
    count, last = config["num_res_blocks"], len(config["channel_mult"]) - 1
    block = 1
    for level in range(last + 1):
        for index in range(count):
            yield f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{index}"
            yield f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{index}"
            block += 1
        yield f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0"
        block += 1
    for index, layer in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{index}", f"mid_block.{layer}"
    block = 0
    for level in range(last + 1):
        attends = 2 ** (last - level) in config["attention_downsamples"]
        for index in range(count + 1):
            yield f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{index}"
            if attends:
                yield f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{index}"
            yield f"output_blocks.{block}.{1 + attends}", f"up_blocks.{level}.upsamplers.0"
            block += 1
