"""Opening checkpoint files without running what they hold."""

import pickle
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


def read_checkpoint(path: str | PathLike[str]) -> Any:
    """What `torch.save` or safetensors wrote, on the CPU; of pickles tensors and plain containers only.

    Raises:
        ValueError: for a file that is missing or damaged, or holds code or other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The checkpoint {str(path)!r} is not a file; check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the version of a pickle
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The checkpoint {str(path)!r} is not loaded: it holds code or objects other than tensors, which could "
            "harm this machine, or it is no file of PyTorch's. Save its state dict alone, as tensors by name."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"The checkpoint {str(path)!r} is damaged or cut short; download it again.") from error


def read_state_dict(path: str | PathLike[str], name: str) -> dict[str, torch.Tensor]:
    """A checkpoint that holds tensors by name.

    Args:
        path: of the file.
        name: of the argument, for the message.

    Raises:
        ValueError: for anything else.
    """
    state = read_checkpoint(path)
    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"`{name}` must be the file of a state dict, tensors by name, got a {type(state).__name__} in "
            f"{str(path)!r}; take the one named model*.pt, ema_*.pt, *_diffusion.pt or *_classifier.pt."
        )
    return state
