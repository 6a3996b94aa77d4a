"""Small networks of guided-diffusion with frozen weights, for the converters' tests."""

import json
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parents[1] / "data"
ARRAYS = np.load(DATA / "adm_networks.npz")


def frozen_weights(shapes):
    """Random weights by name; numpy's legacy generator gives the same numbers for ever."""
    random = np.random.RandomState(0)
    weights = {}
    for name in sorted(shapes):
        draw = random.standard_normal(shapes[name])
        if draw.ndim > 1:
            draw = draw / np.prod(shapes[name][1:]) ** 0.5
        else:
            draw = 1 + 0.3 * draw if name.endswith("weight") else 0.3 * draw
        weights[name] = torch.tensor(draw, dtype=torch.float32)
    return weights


def network(name):
    """A network's flags and its state dict by the original's names; `name` is a key of adm_networks.npz."""
    flags, shapes = (json.loads(str(ARRAYS[f"{name}.{part}"])) for part in ("flags", "shapes"))
    return flags, frozen_weights(shapes)


def names(kind):
    """The networks of a kind, "unet" or "classifier"."""
    return [key.removesuffix(".flags") for key in ARRAYS if key.startswith(kind) and key.endswith(".flags")]


def case(name):
    """Inputs x, t, y and a vector, and what the original gave: its output, and their product's gradient."""
    random = np.random.RandomState(1)
    output, gradient = (torch.from_numpy(ARRAYS[f"{name}.{part}"]) for part in ("out", "vjp_x"))
    batch = len(output)
    x = torch.tensor(random.standard_normal(gradient.shape), dtype=torch.float32)
    w = torch.tensor(random.standard_normal(output.shape), dtype=torch.float32)
    return x, torch.tensor([3.5, 700.0])[:batch], torch.tensor([1, 9])[:batch], w, output, gradient


def assert_near(actual, expected, tolerance):
    """Within a fraction of the largest value."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def as_text(flags):
    """Flags as they stand on a command line; the scripts' default of one differs from the function's."""
    return " ".join(f"--{name} {value}" for name, value in ({"use_scale_shift_norm": False} | flags).items())


def classifier_flags(encoder):
    """The arguments of `EncoderUNetModel` as flags of the classifier."""
    flags = {
        "width": encoder["model_channels"],
        "depth": encoder["num_res_blocks"],
        "attention_resolutions": ",".join(str(encoder["image_size"] // f) for f in encoder["attention_resolutions"]),
        "channel_mult": ",".join(map(str, encoder["channel_mult"])),
        "num_head_channels": encoder.get("num_head_channels", -1),
        "pool": encoder["pool"],
        **{name: encoder.get(name, False) for name in ("use_scale_shift_norm", "resblock_updown")},
        "use_new_attention_order": encoder.get("use_new_attention_order", False),
    }
    return {f"classifier_{name}": value for name, value in flags.items()}
