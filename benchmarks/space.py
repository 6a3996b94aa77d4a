"""The Space under load: 50 visitors at once, 500 requests, 100 malformed ones; who gets what, waits, and memory.

    python benchmarks/space.py
    python benchmarks/space.py --model Emoji --visitors 10 --requests 50

Every image is compared with what one visitor alone gets for the same seed. Prints a table and writes it as JSON.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gradio_client import Client
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from space_server import serve  # noqa: E402

SEEDS = 20
DDIM = {"scheduler": "DDIM"}
REQUESTS = {
    "Digits": {**DDIM, "model": "Digits", "labels": ["3"], "guidance_scale": 8},
    "Emoji": {
        **DDIM, "model": "Emoji", "labels": ["face"], "guidance_scale": 14, "second_label": "google", "second_scale": 12
    },
}  # fmt: skip
STEPS = 5
MALFORMED: list[Any] = [None, [], {}, "x", -1, 1e308, 2.5, True, [[]], "9" * 500, {"path": "/etc/passwd"}]


class Drawn(NamedTuple):
    """What one request got: images, in how many seconds, after how many times of a full queue; the server's MB then."""

    seed: int
    images: np.ndarray
    seconds: float
    full: int
    megabytes: float


def visit(address: str, request: dict[str, Any], seeds: Sequence[int], folder: Path) -> list[Drawn]:
    """A visitor's requests of these seeds, one after the other, each repeated while the queue is full."""
    client, process = Client(address, verbose=False, download_files=str(folder)), int((folder / "pid").read_text())
    drawn = []
    for seed in seeds:
        begin, full = time.perf_counter(), 0
        while True:
            try:
                _, archive, _ = client.predict(**request, steps=STEPS, seed=seed, api_name="/guided")
                break
            except QueueError:  # "Queue is full! Please try again."
                full += 1
                time.sleep(random.uniform(0.5, 1.5))
        seconds = time.perf_counter() - begin
        drawn.append(Drawn(seed, np.load(archive)["arr_0"], seconds, full, memory(process)))
    return drawn


def memory(process: int) -> float:
    """Resident memory in MB."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def malformed(address: str, request: dict[str, Any], count: int) -> Counter:
    """What becomes of requests with one wrong input each."""
    client, outcomes, choose = Client(address, verbose=False), Counter(), random.Random(0)
    names = ["labels", "guidance_scale", "steps", "scheduler", "seed", "guided_from", "guided_to", "model"]
    for _ in range(count):
        wrong = {choose.choice(names): choose.choice(MALFORMED)}
        try:
            client.predict(**{**request, "steps": STEPS, "seed": 0, **wrong}, api_name="/guided")
            outcomes[f"taken: {wrong}"] += 1
        except (AppError, ValueError) as error:
            outcomes["refused in a sentence" if " must be " in str(error) else f"refused: {error}"] += 1
    return outcomes


def load(address: str, request: dict[str, Any], folder: Path, visitors: int, requests: int) -> dict[str, Any]:
    """All requests, dealt out among the visitors, against what one visitor alone got for the same seeds."""
    alone = visit(address, request, range(SEEDS), folder)
    shares = [[i % SEEDS for i in range(first, requests, visitors)] for first in range(visitors)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(visitors) as pool:
        visits = list(pool.map(lambda share: visit(address, request, share, folder), shares))
    seconds, drawn = time.perf_counter() - begin, [one for share in visits for one in share]
    rounds = [max(one.megabytes for one in some) for some in zip(*visits)]
    return {
        "seconds alone, median": float(np.median([one.seconds for one in alone])),
        "requests per second": requests / seconds,
        "wrong images": sum(not np.array_equal(one.images, alone[one.seed].images) for one in drawn),
        "told that the queue is full": sum(one.full for one in drawn),
        "seconds waited, median, p95, most": np.percentile([one.seconds for one in drawn], [50, 95, 100]).tolist(),
        "MB before, and at most in each round of the visitors": [alone[-1].megabytes, *rounds],
    }


def main() -> None:
    """Runs it all against one process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=REQUESTS, default="Digits")
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--malformed", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("out/space.json"))
    args = parser.parse_args()
    request = REQUESTS[args.model]
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.perf_counter()
        with serve(folder) as address:
            report: dict[str, Any] = {"seconds to start": time.perf_counter() - begin}
            report |= load(address, request, folder, args.visitors, args.requests)
            report["malformed"] = dict(malformed(address, request, args.malformed))
            report["images after them"] = len(visit(address, request, [0], folder)[0].images)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
