"""How good a classifier of noisy images is at each level of noise: accuracy, cross entropy and calibration.

The chain's timesteps, from 0, almost clean, to T-1, almost noise, are divided into buckets of equal length; every image
is judged once in each, at a timestep drawn uniformly from it.
"""

import csv
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..pipelines.guidance import log_likelihood, noisy_input

CALIBRATION_BINS = 15  # as in Guo et al. (2017)
MEASURES = {"accuracy": "accuracy", "cross_entropy": "cross entropy (nats)", "calibration_error": "calibration error"}


class NoiseBucket(NamedTuple):
    """A classifier on one bucket of noise levels.

    Args:
        first_timestep: of the bucket, the least noisy.
        last_timestep: of the bucket, included.
        num_images: N.
        accuracy: how often the likeliest class is the image's.
        cross_entropy: mean of -log p(y | x_t), nats.
        calibration_error: [`expected_calibration_error`].
    """

    first_timestep: int
    last_timestep: int
    num_images: int
    accuracy: float
    cross_entropy: float
    calibration_error: float


@torch.no_grad()
def evaluate_noise_levels(
    classifier: Callable[[Tensor, Tensor], Any],
    scheduler: Any,
    images: Any,
    labels: Tensor,
    *,
    num_buckets: int = 10,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> list[NoiseBucket]:
    """Judges a classifier on noisy images, bucket by bucket.

    Args:
        classifier: maps (x_t, t) to an object with logits (B, K); in evaluation mode.
        scheduler: the noise levels, hfdiff's DDPMScheduler or AnnealedLangevinScheduler.
        images: clean images in [-1, 1], (N, C, H, W): a tensor, or an `hfdiff.data.images.ImageSet`.
        labels: their classes, (N,).
        num_buckets: at most; no more than timesteps.
        generator: source of timesteps and noise.
        batch_size: images per model call.

    Raises:
        ValueError: when there is not one label for each of at least one image.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"`labels` must be one per image, got {len(labels)} for {len(images)} images.")
    steps = len(scheduler)
    count = max(1, min(num_buckets, steps))
    edges = [steps * index // count for index in range(count + 1)]
    device = getattr(classifier, "device", torch.device("cpu"))
    rows = []
    for first, end in pairwise(edges):
        logits = []
        for start in range(0, len(images), batch_size):
            x0 = images[start : start + batch_size].to(device)
            timestep = torch.randint(first, end, (len(x0),), generator=generator).to(device)
            noise = randn_tensor(x0.shape, generator=generator, device=device, dtype=x0.dtype)
            logits.append(classifier(noisy_input(scheduler, x0, timestep, noise), timestep).logits.cpu())
        rows.append(NoiseBucket(first, end - 1, len(images), *score(torch.cat(logits), labels)))
    return rows


def average_noise_levels(rows: Sequence[NoiseBucket]) -> dict[str, float]:
    """Accuracy, cross entropy and calibration error, each averaged over buckets."""
    return {name: sum(getattr(row, name) for row in rows) / len(rows) for name in MEASURES}


def score(logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Accuracy, cross entropy (nats) and calibration error of logits (N, K) for classes (N,)."""
    correct = (logits.argmax(dim=-1) == labels).double().mean().item()
    nats = -log_likelihood(logits, labels).double().mean().item()
    return correct, nats, expected_calibration_error(logits.double().softmax(dim=-1), labels)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = CALIBRATION_BINS) -> float:
    """Σ_m |B_m|/N · |acc(B_m) - conf(B_m)|: how far confidence is from accuracy.

    B_m are the images whose largest probability lies in ((m-1)/M, m/M], acc(B_m) how often the class of that
    probability is right, conf(B_m) its mean. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    equation 3. It is biased upwards for few images, by sampling error of the order √(M/N).

    Args:
        probabilities: p(k | x), (N, K).
        labels: classes, (N,).
        num_bins: M, bins of equal width.
    """
    confidence, predicted = probabilities.double().max(dim=-1)
    surplus = confidence - (predicted == labels).double()
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    return torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, surplus).abs().sum().item() / len(labels)


# --- tables and a plot -----------------------------------------------------------------------------------------------


def format_noise_levels(rows: Sequence[NoiseBucket]) -> str:
    """A table to print."""
    lines = [f"{'timesteps':>12} {'accuracy':>9} {'cross entropy':>14} {'calibration error':>18}"]
    for row in rows:
        span = f"{row.first_timestep} to {row.last_timestep}"
        lines.append(f"{span:>12} {row.accuracy:9.3f} {row.cross_entropy:14.3f} {row.calibration_error:18.3f}")
    return "\n".join(lines)


def save_noise_levels(rows: Sequence[NoiseBucket], folder: str | Path) -> None:
    """Writes `noise_levels.json` and `noise_levels.csv`."""
    table = [row._asdict() for row in rows]
    Path(folder, "noise_levels.json").write_text(json.dumps(table, indent=2) + "\n")
    with Path(folder, "noise_levels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, NoiseBucket._fields)
        writer.writeheader()
        writer.writerows(table)


def plot_noise_levels(rows: Sequence[NoiseBucket], path: str | Path) -> None:
    """Draws accuracy, cross entropy and calibration error over the timestep.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    middles = [(row.first_timestep + row.last_timestep) / 2 for row in rows]
    for axes, (name, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items()):
        axes.plot(middles, [getattr(row, name) for row in rows], marker="o")
        axes.set(xlabel="timestep (larger is noisier)", ylabel=label, ylim=(0, 1.02 if name == "accuracy" else None))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
