"""What an evaluation takes: the time of FID from files to number, and the memory of its statistics.

python benchmarks/evaluation.py [--features classifier:pipelines/mnist-judge] [--num_features 1000000]
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hfdiff.evaluation import (
    Evaluator,
    RunningStatistics,
    compute_statistics,
    load_features,
    open_images,
    open_reference,
    save_statistics,
)

WIDTH = 2048  # Inception's
BATCH = 1000
FEW = 10_000


def time_evaluation(features: str, count: int, size: int) -> None:
    """FID of an npz file of grey images against cached statistics, opened, decoded and computed."""
    with tempfile.TemporaryDirectory() as folder:
        images, statistics = Path(folder, "images.npz"), Path(folder, "statistics.npz")
        np.savez(images, np.random.default_rng(0).integers(256, size=(count, size, size, 1), dtype=np.uint8))
        found = compute_statistics(open_images(images), load_features(features))
        save_statistics(statistics, found.pooled, found.spatial, found.features)
        start, busy = time.perf_counter(), time.process_time()
        Evaluator(open_reference(statistics), load_features(features), ["fid"])(open_images(images))
        seconds, work = time.perf_counter() - start, time.process_time() - busy
    print(
        f"FID of {count} images of {size} px, {features}: {seconds:.1f} s, of which {work:.1f} s of processor time on "
        f"{torch.get_num_threads()} threads"
    )


def peak_memory() -> float:
    """Of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, KiB elsewhere


def measure_memory(count: int) -> None:
    """Peak memory after few and after many features went into the statistics."""
    running, start = RunningStatistics(), time.perf_counter()
    before = peak_memory()
    for done in range(0, count, BATCH):
        if done == FEW:
            few = peak_memory()
        running.update(torch.randn(BATCH, WIDTH))
    print(
        f"Statistics of features of width {WIDTH}: peak memory {before:.0f} MB before, {few:.0f} MB at {FEW}, "
        f"{peak_memory():.0f} MB at {running.count}; {time.perf_counter() - start:.0f} s"
    )


def main() -> None:
    """Runs both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default="classifier:pipelines/mnist-judge")
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--num_features", type=int, default=1_000_000, help=f"a multiple of {BATCH} above {FEW}")
    args = parser.parse_args()
    measure_memory(args.num_features)
    time_evaluation(args.features, args.num_images, args.size)


if __name__ == "__main__":
    main()
