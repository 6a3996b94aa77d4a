"""What to measure and how. It is checked before slow imports, so nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

METRIC_NAMES = (
    "fid",
    "fid_infinity",
    "is",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "cmmd",
    "sfid",
    "copies",
    "copies_features",
    "accuracy",
    "worst_class_accuracy",
)  # of `metric_set.METRICS`
COPIES = ("copies", "copies_features")
OF_SUMS = ("fid", "fid_infinity", "sfid")  # what they compare with
OF_IMAGES = ("kid", "precision", "recall", "density", "coverage", "cmmd", *COPIES)
OF_PIXELS = ("copies",)  # need no network
COPY_NEIGHBOURS, COPY_THRESHOLD = 50, 0.5  # n and α of Carlini et al. 2023, section 5.1
LEAST = {"seed": 0, "copies_nearest": 2, "copies_threshold": 0}  # of settings that may be less, or must be more, than 1
OF_CLASSES = ("is", "accuracy", "worst_class_accuracy")  # need features of a classifier
WITHOUT_CLASSES = ("pixels", "dinov2", "clip")  # kinds of features
SPLIT_SIZE = 5000  # images of each split of the Inception Score, as in guided-diffusion's evaluator


@dataclass(frozen=True)
class EvaluationSettings:
    """How the metrics are computed.

    Args:
        batch_size: images per call of the network.
        is_split_size: images of each split of the Inception Score.
        kid_subset_size: images of each of KID's subsets, at most; all where there are fewer.
        kid_num_subsets: how many subsets.
        nearest: the neighbour k of precision and recall.
        density_nearest: the neighbour k of density and coverage.
        copies_nearest: how many neighbours set the scale of a copy's distance.
        copies_threshold: the ratio up to which a sample is a copy, from 0 to 1; held-out images may lower it.
        seed: of the subsets.

    Raises:
        ValueError: for a number out of its range: below 1, if nothing else is said.
    """

    batch_size: int = 256
    is_split_size: int = SPLIT_SIZE
    kid_subset_size: int = 1000
    kid_num_subsets: int = 100
    nearest: int = 3
    density_nearest: int = 5
    copies_nearest: int = COPY_NEIGHBOURS
    copies_threshold: float = COPY_THRESHOLD
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = LEAST.get(name, 1)
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.copies_threshold > 1:
            raise ValueError(f"`copies_threshold` must be at most 1, got {self.copies_threshold}.")


def check_metrics(metrics: Sequence[str], has_reference: bool, features: str = "") -> None:
    """Refuses metrics that are unknown, or need a reference or class probabilities that are not there.

    Raises:
        ValueError: then.
    """
    unknown = [name for name in metrics if name not in METRIC_NAMES]
    if unknown or not metrics:
        raise ValueError(f"`metrics` must be some of {', '.join(METRIC_NAMES)}, got {', '.join(unknown) or 'none'}.")
    for name in metrics:
        if name in OF_CLASSES and features.partition(":")[0] in WITHOUT_CLASSES:
            raise ValueError(
                f"`features` must be of a classifier for {name}, got {features!r}; take classifier:<folder>."
            )
        if not has_reference and name in (*OF_SUMS, *OF_IMAGES):
            what = "images or their statistics" if name in OF_SUMS else "images"
            raise ValueError(f"`reference` must have {what} for {name}, got none; name the real images.")
