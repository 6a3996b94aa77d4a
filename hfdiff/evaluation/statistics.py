"""Mean and covariance of features, accumulated batch by batch in float64, and the files they are kept in."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ASYMMETRY = 1e-5  # of a covariance, relative to its largest entry; files in float32 stay below it
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError)


class FeatureStatistics(NamedTuple):
    """A Gaussian fitted to features.

    Args:
        mean: μ, float64, (D,).
        covariance: C, float64, (D, D), normalised by N - 1.
        num_images: N, that they are of; None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int | None = None


class StatisticsFile(NamedTuple):
    """What a file of statistics holds.

    Args:
        pooled: of the features, for FID.
        spatial: of the spatial features, for sFID, where the file has them.
        features: where the features come from, as the extractor says it; empty where the file does not say.
        source: where the statistics come from, for messages.
    """

    pooled: FeatureStatistics
    spatial: FeatureStatistics | None
    features: dict[str, Any]
    source: str


class RunningStatistics:
    """Mean and covariance of features that come in batches, in one pass and in memory for one D × D matrix.

    Sums are of differences from the mean, so nothing cancels, however far the mean is from zero: Chan, Golub & LeVeque,
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, equation 1.5, in vectors.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor | np.ndarray) -> None:
        """Adds a batch.

        Args:
            features: (B, D).

        Raises:
            ValueError: for another shape than (B, D), another width than before, or NaN.
        """
        batch = as_features("features", features)
        if not self.count:
            self.mean = batch.new_zeros(batch.shape[1])
            self.scatter = batch.new_zeros(batch.shape[1], batch.shape[1])
        elif batch.shape[1] != len(self.mean):
            raise ValueError(
                f"`features` must have the width of the batches before, {len(self.mean)}, got {batch.shape[1]}; use "
                "one network."
            )
        total = self.count + len(batch)
        mean = batch.mean(dim=0)
        centred = batch - mean
        self.scatter.addmm_(centred.T, centred)
        shift = mean - self.mean
        self.scatter.addr_(shift, shift, alpha=self.count * len(batch) / total)
        self.mean += shift * (len(batch) / total)
        self.count = total

    def finish(self) -> FeatureStatistics:
        """The statistics of everything that was added.

        Raises:
            ValueError: for fewer than two rows, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, got {self.count}; give more.")
        return FeatureStatistics(self.mean.clone(), self.scatter / (self.count - 1), self.count)


def feature_statistics(features: Tensor | np.ndarray) -> FeatureStatistics:
    """Mean and covariance of features (N, D).

    Raises:
        ValueError: for another shape, NaN, or fewer than two rows.
    """
    running = RunningStatistics()
    running.update(features)
    return running.finish()


def as_features(name: str, features: Tensor | np.ndarray, minimum: int = 1) -> Tensor:
    """Features (N, D) in float64, on their device; arguments and errors as in [`as_rows`]."""
    return as_rows(name, features, minimum).double()


def as_rows(name: str, features: Tensor | np.ndarray, minimum: int = 1) -> Tensor:
    """Features (N, D) of their own type, on their device.

    Args:
        name: of the argument, for messages.
        features: (N, D), of any real type.
        minimum: the fewest rows that make sense.

    Raises:
        ValueError: for another shape, too few rows, or numbers that are not finite.
    """
    features = torch.as_tensor(features)
    if features.ndim != 2 or len(features) < minimum or not features.shape[1]:
        raise ValueError(
            f"`{name}` must have shape (N, D) with N of at least {minimum}, one row per image, got "
            f"{tuple(features.shape)}; flatten each image's features and give enough images."
        )
    if not features.isfinite().all():
        row = int((~features.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"`{name}` must be finite, got NaN or infinity in row {row}; check the network and its input.")
    return features


def save_statistics(
    path: str | Path,
    pooled: FeatureStatistics,
    spatial: FeatureStatistics | None = None,
    features: dict[str, Any] | None = None,
) -> None:
    """Writes an npz file that pytorch-fid and EDM (mu, sigma) and guided-diffusion (mu_s, sigma_s) read, too.

    Args:
        path: of the file, ending in `.npz`.
        pooled: of the features.
        spatial: of the spatial features.
        features: where the features come from, in JSON values; read back by [`load_statistics`].

    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"`path` of statistics must end in .npz, got {path.name!r}.")
    arrays: dict[str, Any] = {"mu": pooled.mean.cpu().numpy(), "sigma": pooled.covariance.cpu().numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.cpu().numpy(), "sigma_s": spatial.covariance.cpu().numpy()}
    if pooled.num_images is not None:
        arrays["num_images"] = np.asarray(pooled.num_images)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, provenance=np.asarray(json.dumps(features or {})), **arrays)


def load_statistics(path: str | Path) -> StatisticsFile:
    """Reads statistics: mu and sigma, as pytorch-fid, EDM and hfdiff write them, and guided-diffusion's mu_s, sigma_s.

    Raises:
        ValueError: for a file that cannot be read, lacks the arrays, or whose arrays are no mean and covariance.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name != "arr_0"}
        features = json.loads(str(arrays.get("provenance", "{}")))
    except UNREADABLE as error:
        raise ValueError(f"{str(path)!r} must be an npz file of statistics: {error}; write it again.") from error
    if not {"mu", "sigma"} <= set(arrays):
        raise ValueError(f"{str(path)!r} must hold mu and sigma, got {sorted(arrays)}.")
    count = int(arrays["num_images"]) if "num_images" in arrays else None
    spatial = _read(path, arrays, "mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= set(arrays) else None
    return StatisticsFile(_read(path, arrays, "mu", "sigma", count), spatial, features, str(path))


def _read(path: str | Path, arrays: dict[str, Any], mu: str, sigma: str, count: int | None) -> FeatureStatistics:
    kinds = [arrays[name].dtype for name in (mu, sigma)]
    if any(kind.kind not in "fiu" for kind in kinds):
        raise ValueError(f"{mu} and {sigma} of {str(path)!r} must be numbers, got {kinds[0]} and {kinds[1]}.")
    mean, covariance = torch.as_tensor(arrays[mu]).double(), torch.as_tensor(arrays[sigma]).double()
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{mu} and {sigma} of {str(path)!r} must have shapes (D,) and (D, D), got {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}."
        )
    finite = mean.isfinite().all() and covariance.isfinite().all()
    if not finite or (covariance - covariance.T).abs().max() > ASYMMETRY * covariance.abs().max():
        raise ValueError(f"{mu} and {sigma} of {str(path)!r} must be finite and {sigma} symmetric; compute them again.")
    if (covariance.diagonal() < 0).any():
        raise ValueError(f"{sigma} of {str(path)!r} must hold variances of at least 0; compute it again.")
    return FeatureStatistics(mean, covariance, count)
