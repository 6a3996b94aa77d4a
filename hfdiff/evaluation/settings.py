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
    "sfid",
    "accuracy",
    "worst_class_accuracy",
)  # of `metric_set.METRICS`
OF_SUMS, OF_IMAGES = ("fid", "fid_infinity", "sfid"), ("kid", "precision", "recall")  # what they compare
COPY_NEIGHBOURS, COPY_THRESHOLD = 50, 0.5  # n and α of Carlini et al. 2023, section 5.1
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
        seed: of the subsets.

    Raises:
        ValueError: for a number below 1, or a negative seed.
    """

    batch_size: int = 256
    is_split_size: int = SPLIT_SIZE
    kid_subset_size: int = 1000
    kid_num_subsets: int = 100
    nearest: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "seed" else 1
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_metrics(metrics: Sequence[str], has_reference: bool) -> None:
    """Refuses metrics that are unknown, or need a reference that is not there.

    Raises:
        ValueError: then.
    """
    unknown = [name for name in metrics if name not in METRIC_NAMES]
    if unknown or not metrics:
        raise ValueError(f"`metrics` must be some of {', '.join(METRIC_NAMES)}, got {', '.join(unknown) or 'none'}.")
    for name in metrics:
        if not has_reference and name in (*OF_SUMS, *OF_IMAGES):
            what = "images or their statistics" if name in OF_SUMS else "images"
            raise ValueError(f"`reference` must have {what} for {name}, got none; name the real images.")
