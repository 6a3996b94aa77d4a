"""Where images, labels and earlier models come from: scikit-learn's digits, files, folders and the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import HfApi, constants
from PIL import Image
from torch import Tensor

from ..pipelines.hub_download import speaking

DIGITS = "digits"
NUM_DIGITS_TO_TRAIN = 1500  # of scikit-learn's 1,797; the later ones are of other writers
FILES = {".parquet": "parquet", ".arrow": "arrow"}  # suffixes and the builders that read them
SAVED = ("state.json", "dataset_dict.json")  # what `Dataset.save_to_disk` leaves
GREY_LEVELS = 16  # of scikit-learn's digits


def load_digits(split: str) -> tuple[list[Image.Image], Tensor, list[str]]:
    """Scikit-learn's 8×8 digits as pictures of floats in [-1, 1], with labels (N,) and names."""
    from sklearn.datasets import load_digits as load

    digits = load()
    part = slice(None, NUM_DIGITS_TO_TRAIN) if split == "train" else slice(NUM_DIGITS_TO_TRAIN, None)
    pixels = (digits.images[part] / (GREY_LEVELS / 2) - 1).astype(np.float32)
    pictures = [Image.fromarray(picture) for picture in pixels]
    return pictures, torch.from_numpy(digits.target[part]).long(), [str(name) for name in digits.target_names]


def open_dataset(source: str, split: str, config_name: str | None = None) -> Dataset:
    """One split of a dataset.

    Args:
        source: a parquet or arrow file, which is taken whole; a folder of them, of images, or saved by `datasets`; or a
            Hub id.
        split: its name, where the source has some.
        config_name: which configuration, where a folder or Hub dataset has several.

    Raises:
        ValueError: when it is not there, cannot be read, has no such split, or is empty.
    """
    path = Path(source)
    with _one_line(source):
        if path.is_file() and path.suffix in FILES:
            dataset = load_dataset(FILES[path.suffix], data_files={split: source}, split=split)
        elif path.is_file():
            raise ValueError(f"a file must be one of {', '.join(FILES)}")
        elif any((path / name).is_file() for name in SAVED):
            dataset = _pick_split(load_from_disk(source), split)
        elif path.is_dir():
            dataset = load_dataset(source, config_name, split=split)
        elif _may_be_hub_id(source):
            dataset = _load_from_hub(source, config_name, split)
        else:
            raise ValueError("there is no such file or folder")
        if not len(dataset):
            raise ValueError("it holds no images")
    return dataset


def _pick_split(dataset: Dataset | DatasetDict, split: str) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    if split not in dataset:
        raise ValueError(f"its splits are {sorted(dataset)}, not {split!r}")
    return dataset[split]


def _may_be_hub_id(source: str) -> bool:
    return source.count("/") < 2 and not source.startswith((".", "/", "~")) and Path(source).suffix not in FILES


def _load_from_hub(source: str, config_name: str | None, split: str) -> Dataset:
    """A dataset of the Hub, from the cache where the Hub cannot be reached.

    The Hub is asked for it first, since `load_dataset` tries again for half a minute.
    """
    usual = datasets.config.HF_HUB_OFFLINE
    problem = ConnectionError("the cache lacks it, and offline the Hub is not asked.")
    try:
        if not usual:
            with speaking(source):
                HfApi().dataset_info(source, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except ConnectionError as error:
        datasets.config.HF_HUB_OFFLINE, problem = True, error
    try:
        return load_dataset(source, config_name, split=split)
    except ConnectionError:
        raise problem from None
    finally:
        datasets.config.HF_HUB_OFFLINE = usual


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turns the many errors of opening a dataset into one line."""
    try:
        yield
    except (ConnectionError, PermissionError) as error:
        raise ValueError(f"The dataset {source!r} cannot be had: {error}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".!")
        if "Unknown split" in reason:
            raise ValueError(
                f"The dataset {source!r} must have the split asked for: {reason}; put those images into a folder "
                "of that name in it, or give a file, or the folder of a dataset, that has them."
            ) from error
        raise ValueError(
            f"The dataset must be {DIGITS!r}, a parquet or arrow file, a folder of them or of images, or a Hub id, "
            f"got {source!r}: {reason}; check the name."
        ) from error


@contextmanager
def reading_model(argument: str, source: str) -> Iterator[None]:
    """Turns the errors of loading a model that is not there into one line.

    Args:
        argument: the setting that names the model.
        source: its value.

    Raises:
        ValueError: in their place.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"`{argument}` must be a model's folder or Hub id, got {source!r}: {reason}.") from error


def check_column(dataset: Dataset, argument: str, column: str, source: str) -> None:
    """Refuses a column that is not there, and tells which one it may be.

    Raises:
        ValueError: when it is not there.
    """
    if column in dataset.column_names:
        return
    kind = datasets.Image if argument == "image_column" else ClassLabel
    likely = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    remedy = f"`--{argument} {likely[0]}` looks right" if len(likely) == 1 else "name one of these"
    if argument == "label_column" and not likely:
        remedy = (
            "labels are a column of integers, one folder of images per class, or the beginning of the files' names, "
            "class_name.png, with `--labels_from_names`"
        )
    raise ValueError(f"`{argument}` must be one of {dataset.column_names} of {source!r}, got {column!r}; {remedy}.")


def read_file_labels(dataset: Dataset, image_column: str, source: str) -> tuple[Tensor, list[str]]:
    """Labels (N,) and names of the classes from files named class_name.png, as guided-diffusion reads them.

    Raises:
        ValueError: for images without such a name.
    """
    stored = dataset.cast_column(image_column, datasets.Image(decode=False))[:][image_column]
    files = [Path(row["path"] or "").name for row in stored]
    for file in files:
        if "_" not in file:
            raise ValueError(
                f"`labels_from_names` needs files named like class_name.png, got {file!r} in {source!r}; rename it, or "
                "give labels by one folder per class."
            )
    found = [file.partition("_")[0] for file in files]
    names = sorted(set(found))
    return torch.tensor([names.index(name) for name in found]), names


def read_labels(dataset: Dataset, column: str) -> tuple[Tensor, list[str]]:
    """Labels (N,) from 0 to K-1, and the names of the K classes; integers name themselves.

    Raises:
        ValueError: for labels that are not integers in that range, or missing.
    """
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel) and "int" not in str(getattr(feature, "dtype", "")):
        raise ValueError(
            f"`label_column` must hold integers, got {column!r} of {feature}; convert it with "
            "`dataset.class_encode_column`."
        )
    values = dataset.with_format("arrow")[:][column]
    if values.null_count:
        row = values.to_pylist().index(None)
        raise ValueError(f"`label_column` must label every image, got none in row {row} of {column!r}; drop that row.")
    labels = torch.tensor(values.to_pylist(), dtype=torch.int64)
    named = isinstance(feature, ClassLabel)
    classes = feature.num_classes if named else int(labels.max()) + 1
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"`label_column` must hold classes from 0 to {classes - 1}, got {labels[row]} in row {row} of {column!r}; "
            "drop that row."
        )
    if not named and classes > len(labels):
        raise ValueError(
            f"`label_column` must number the classes from 0 on, got {classes - 1} among {len(labels)} images in "
            f"{column!r}; convert it with `dataset.class_encode_column`."
        )
    return labels, list(feature.names) if named else [str(number) for number in range(classes)]
