"""Faster inference on the machine at hand: the dtype its arithmetic is fast in, memory layout and compilation."""

import shutil
import warnings

import torch
from torch import nn


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies matrices in it, else float32: elsewhere bfloat16 is emulated and slower."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        fast = device.type == "cpu" and has_bf16
    return torch.bfloat16 if fast else torch.float32


def optimize_module(module: nn.Module, device: torch.device) -> None:
    """Makes a module's inference faster, in place: frozen weights in the fastest dtype, compiled for each input shape.

    Weights in float64 are left so. Layout is channels-last on a GPU alone: measured on a CPU, it slows small networks.
    """
    module.requires_grad_(False).eval()
    dtype = fastest_dtype(device)
    if {parameter.dtype for parameter in module.parameters()}.isdisjoint({dtype, torch.float64}):
        nn.Module.to(module, dtype)  # diffusers' own warns of modules to be kept in float32, of which there are none
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cpu" and not shutil.which("g++"):
        warnings.warn("Models are not compiled: torch.compile needs a C++ compiler, g++, on the CPU.", stacklevel=3)
        return
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")  # of diffusers
    module.compile(dynamic=False)
