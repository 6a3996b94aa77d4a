"""A trained folder with the weights of another average, from what its run wrote down."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from ..data.files import new_folder
from ..hub.folder import publishable_files
from .geometry import OF_UNET
from .power_average import combine, find_averages, reconstruct

LARGEST_ERROR = 0.2  # of a profile
MEASURED = ("samples/*", "noise_levels.*", "*.png", "*.npz", "*.md")  # of other weights


def average_run(run_folder: Path, sigma_rel: float, destination: Path) -> tuple[float, int]:
    """Writes the folder that a run saved, with the weights of a power average of any length.

    What was measured of the run's own weights stays behind.

    Args:
        run_folder: of a training with `average_snapshots`, at its end.
        sigma_rel: the length, as a share of the training.
        destination: a new or an empty folder.

    Returns:
        By how much the profile of the weights misses that of the length, as a share of it, and from how many averages
        they were made.

    Raises:
        ValueError: when the run wrote none, the length cannot be made from them, or the destination has files.
    """
    written = find_averages(run_folder)
    coefficients, error = combine(written, sigma_rel)
    if error > LARGEST_ERROR:
        raise ValueError(
            f"`sigma_rel` must be a length that the {len(written)} averages of {str(run_folder)!r} make, got "
            f"{sigma_rel:g}, which they miss by {error:.0%}; choose one nearer to 0.05 or 0.1, or train with more "
            "`--average_snapshots`."
        )
    kept = [name for name in publishable_files(run_folder) if not any(Path(name).match(one) for one in MEASURED)]
    tensors = {name.removeprefix(OF_UNET): tensor for name, tensor in reconstruct(written, coefficients)}
    with new_folder(destination) as folder:
        for name in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run_folder / name, folder / name)
        file, names = find_weights(folder, tensors)
        safetensors.torch.save_file({name: tensors[name] for name in names}, file, metadata={"format": "pt"})
    return error, len(written)


def find_weights(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[Path, list[str]]:
    """The file of a folder that holds the trained weights, and their names there.

    Raises:
        ValueError: when there is none.
    """
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (no dict)
        if all(name in tensors and list(tensors[name].shape) == shape for name, shape in shapes.items()):
            return file, list(shapes)
    raise ValueError("`run_folder` must hold the model that its run averaged, got another; let the run end first.")
