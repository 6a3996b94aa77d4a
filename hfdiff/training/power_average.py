"""Averages of the weights whose length is chosen after the training (Karras et al. 2024, section 3 and appendix C).

"Analyzing and Improving the Training Dynamics of Diffusion Models". A power average of length σ_rel weighs the weights
after step τ of t by a profile p(τ) ∝ τ^γ, whose standard deviation is σ_rel of the training so far. A run keeps two of
them and writes both down now and then. Any other is then, nearly, the linear combination of what was written whose
profile is nearest in the mean square.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import Tensor, nn

from ..data.files import place_file

KEPT = (0.05, 0.10)  # σ_rel of the two averages of a run
FOLDER = "averages"  # of what is written, in a run's folder
FILE = re.compile(r"step-(\d+)\.safetensors")
SHORTEST, LONGEST = 0.01, 0.28  # σ_rel; at 0.289 the average is of all steps alike


def exponent(sigma_rel: float) -> float:
    """γ of the profile τ^γ of a length: σ_rel² = (γ+1) / ((γ+2)² (γ+3)), section 3.1.

    Raises:
        ValueError: for a length outside of [0.01, 0.28].
    """
    if not SHORTEST <= sigma_rel <= LONGEST:
        raise ValueError(f"`sigma_rel` must be from {SHORTEST} to {LONGEST} of the training, got {sigma_rel}.")
    inverse = sigma_rel**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


class PowerAverage(EMAModel):
    """A power average: the decay of step t is (1 - 1/t)^(γ+1), section 3.1.

    Args:
        parameters: the weights, as they are before the first step.
        sigma_rel: its length.
        foreach: update all parameters in one call.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], sigma_rel: float, foreach: bool) -> None:
        super().__init__(parameters, foreach=foreach)
        self.exponent = exponent(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        """Of a step, from 1."""
        return (1 - 1 / optimization_step) ** (self.exponent + 1)


# --- what a run writes -----------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """An average that was written down.

    Args:
        step: t, after which it was.
        sigma_rel: its length.
        path: the file, of both averages then.
    """

    step: int
    sigma_rel: float
    path: Path


def is_written(step: int, total: int, count: int) -> bool:
    """Whether the averages are written after a step (from 1): `count` times in a run of `total` steps, evenly."""
    return step * count // total > (step - 1) * count // total


def average_name(sigma_rel: float) -> str:
    """The name of a kept average in a checkpoint."""
    return f"average-{sigma_rel:.2f}"


def write_averages(output_dir: Path, step: int, averages: dict[float, dict[str, Tensor]]) -> None:
    """Writes the averages after a step, whole or not at all.

    Raises:
        OSError: when the disk is full.
    """
    folder = output_dir / FOLDER
    tensors = {
        f"{sigma_rel}:{name}": tensor for sigma_rel, weights in averages.items() for name, tensor in weights.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place_file(folder / f"step-{step}.safetensors", safetensors.torch.save(tensors))
    except OSError as error:
        raise OSError(
            f"Could not write the averages after step {step} to {folder}: {error}; the checkpoints are intact. Make "
            "room, then go on with `--resume_from_checkpoint latest`."
        ) from error


def drop_averages(output_dir: Path, step: int) -> None:
    """Removes what was written after later steps than a run goes on from."""
    for path in (output_dir / FOLDER).glob("*"):
        match = FILE.fullmatch(path.name)
        if not match or int(match[1]) > step:
            path.unlink()


def find_averages(output_dir: Path) -> list[Written]:
    """What a run wrote, the oldest first.

    Raises:
        ValueError: when it wrote none.
    """
    folder = output_dir / FOLDER
    found = {int(match[1]): path for path in folder.glob("*") if (match := FILE.fullmatch(path.name))}
    if not found:
        raise ValueError(
            f"`run_folder` must be the folder of a training with `--average_snapshots`, got {str(output_dir)!r} "
            f"without {FOLDER}; train with them."
        )
    return [Written(step, sigma_rel, found[step]) for step in sorted(found) for sigma_rel in KEPT]


# --- another average from them ---------------------------------------------------------------------------------------


def inner_products(steps: np.ndarray, powers: np.ndarray, step: np.ndarray, power: np.ndarray) -> np.ndarray:
    """∫ p q dτ of profiles p = n τ^(n-1) / t^n up to t, with n = γ+1, broadcast; appendix C."""
    end = np.minimum(steps, step)
    return (end / steps) ** powers * (end / step) ** power * powers * power / (end * (powers + power - 1))


def combine(written: Sequence[Written], sigma_rel: float) -> tuple[np.ndarray, float]:
    """The coefficients with which averages make another one, of the last step among them.

    Differs from the paper: they are held to sum to 1, so that weights that do not move come out as they are.

    Args:
        written: the averages.
        sigma_rel: length of the other.

    Returns:
        The coefficients, and by how much their profile misses the other's: ‖difference‖ / ‖profile‖.
    """
    last = max(average.step for average in written)
    steps = np.array([average.step / last for average in written])
    powers = np.array([exponent(average.sigma_rel) + 1 for average in written])
    one, power, count = np.array(1.0), np.array(exponent(sigma_rel) + 1), len(written)
    gram = inner_products(steps[:, None], powers[:, None], steps, powers)
    target = inner_products(steps, powers, one, power)
    border = np.ones((count, 1))
    system = np.block([[gram, border], [border.T, np.zeros((1, 1))]])
    x = np.linalg.lstsq(system, np.append(target, 1), rcond=1e-14)[0][:count]
    whole = inner_products(one, power, one, power)
    return x, float(np.sqrt(max(0.0, (whole - 2 * target @ x + x @ gram @ x) / whole)))


def reconstruct(written: Sequence[Written], coefficients: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a combination of averages by name, float32, summed in float64; one at a time."""
    files = {average.path: safe_open(average.path, "pt") for average in written}
    prefix = f"{KEPT[0]}:"
    for key in files[written[0].path].keys():  # noqa: SIM118 (it is no dict)
        if name := key.removeprefix(prefix) if key.startswith(prefix) else "":
            parts = (files[average.path].get_tensor(f"{average.sigma_rel}:{name}").double() for average in written)
            yield name, sum(float(x) * part for x, part in zip(coefficients, parts)).float()
