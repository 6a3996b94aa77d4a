"""A classifier's accuracy, cross entropy and calibration by noise: exact answers, and the mixture's own posterior."""

import csv
import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gaussian_mixture import ExactClassifier, Mixture
from PIL import Image
from torch import Tensor

from hfdiff.data.images import gather
from hfdiff.evaluation.noise_levels import (
    NoiseBucket,
    average_noise_levels,
    evaluate_noise_levels,
    expected_calibration_error,
    format_noise_levels,
    plot_noise_levels,
    save_noise_levels,
    score,
)
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler


def two_classes(confidence: list[float]) -> Tensor:
    """Probabilities of class 0 and 1."""
    return torch.tensor([[p, 1 - p] for p in confidence], dtype=torch.float64)


@pytest.mark.parametrize(
    ("confidence", "labels", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0], 0.0),  # sure and right
        ([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1], 1.0),  # sure and wrong
        ([0.75] * 4, [0, 0, 0, 1], 0.0),  # right as often as it says
        ([0.75] * 4, [0, 0, 0, 0], 0.25),
        ([0.95, 0.95, 0.55, 0.55], [0, 1, 0, 0], 0.45),  # (2 |0.5 - 0.95| + 2 |1 - 0.55|) / 4
        ([0.72, 0.68], [0, 1], 0.3 - 0.1),  # one bin, (0.6667, 0.7333]: |0.5 - 0.7|
    ],
)
def test_calibration_error_by_hand(confidence: list[float], labels: list[int], expected: float) -> None:
    assert expected_calibration_error(two_classes(confidence), torch.tensor(labels)) == pytest.approx(expected)


def test_calibration_error_of_a_guess_is_its_distance_from_one_over_k() -> None:
    uniform = torch.full((10, 5), 0.2)
    assert expected_calibration_error(uniform, torch.zeros(10, dtype=torch.int64)) == pytest.approx(0.8)


def test_scores_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    accuracy, nats, error = score(logits, torch.tensor([0, 0]))
    assert accuracy == 0.5
    assert nats == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert error == pytest.approx(0.25)


def draw_mixture(mixture: Mixture, count: int) -> tuple[Tensor, Tensor]:
    component = torch.multinomial(mixture.weights, count, replacement=True)
    x0 = mixture.means[component] + mixture.scales[component, None] * torch.randn(count, 2, dtype=torch.float64)
    return x0.view(count, 1, 1, 2), mixture.classes[component]


def test_the_exact_posterior_is_calibrated_at_every_noise_and_a_sharpened_one_is_not() -> None:
    scheduler = DDPMScheduler()
    mixture = Mixture(scheduler.alphas_cumprod)
    x0, labels = draw_mixture(mixture, 20_000)
    exact = ExactClassifier().attach(mixture)
    rows = evaluate_noise_levels(
        exact, scheduler, x0, labels, num_buckets=4, generator=torch.Generator().manual_seed(0), batch_size=20_000
    )
    # Each bin's surplus has a standard deviation of at most √(n_m)/2, so the sum over 15 bins stays below √(15/N)/2.
    assert all(row.calibration_error < (15 / 20_000) ** 0.5 for row in rows), rows
    assert rows[-1].cross_entropy == pytest.approx(math.log(2), abs=0.01)  # two classes of even odds, unseen in noise
    assert rows[-1].accuracy == pytest.approx(0.5, abs=0.03)
    assert [row.accuracy for row in rows] == sorted((row.accuracy for row in rows), reverse=True)

    sharpened = lambda xt, t: SimpleNamespace(logits=3 * exact(xt, t).logits)  # noqa: E731
    for row, sharp in zip(rows, evaluate_noise_levels(sharpened, scheduler, x0, labels, num_buckets=4), strict=True):
        assert sharp.cross_entropy > row.cross_entropy
        assert sharp.calibration_error > 2 * row.calibration_error


@pytest.mark.parametrize(("steps", "buckets"), [(1000, 10), (10, 4), (3, 10), (1, 10)])
def test_buckets_divide_the_chain_and_each_image_is_seen_once_in_each(steps: int, buckets: int) -> None:
    seen = []

    def classifier(xt: Tensor, t: Tensor) -> SimpleNamespace:
        seen.append(t)
        return SimpleNamespace(logits=torch.zeros(len(xt), 3))

    scheduler = DDPMScheduler(num_train_timesteps=steps)
    images = torch.zeros(200, 1, 2, 2)
    rows = evaluate_noise_levels(
        classifier, scheduler, images, torch.zeros(200, dtype=torch.int64), num_buckets=buckets, batch_size=200
    )
    assert len(rows) == min(steps, buckets)
    assert [rows[0].first_timestep, rows[-1].last_timestep] == [0, steps - 1]
    for row, after in pairwise(rows):
        assert after.first_timestep == row.last_timestep + 1
    for row, timesteps in zip(rows, seen, strict=True):
        assert timesteps.min() >= row.first_timestep
        assert timesteps.max() <= row.last_timestep
        assert (row.num_images, row.cross_entropy) == (200, pytest.approx(math.log(3)))


def test_a_seed_gives_the_same_numbers_and_leaves_the_global_random_state() -> None:
    scheduler = DDPMScheduler()
    pixels = [np.full((2, 2), level, np.uint8) for level in range(50)]
    images, labels = gather(lambda rows: [pixels[row] for row in rows], 50), torch.arange(50) % 2
    before = torch.get_rng_state()
    weight = torch.linspace(-1, 1, 8).view(4, 2)
    classifier = lambda xt, t: SimpleNamespace(logits=xt.flatten(1) @ weight)  # noqa: E731
    first, again = (
        evaluate_noise_levels(classifier, scheduler, images, labels, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert first == again
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_must_belong_to_the_images() -> None:
    with pytest.raises(ValueError, match=r"labels.*2 for 3 images"):
        evaluate_noise_levels(lambda xt, t: None, DDPMScheduler(), torch.zeros(3, 1, 2, 2), torch.zeros(2))


ROWS = [NoiseBucket(0, 499, 7, 0.9, 0.25, 0.05), NoiseBucket(500, 999, 7, 0.5, 1.25, 0.15)]


def test_averages_are_over_buckets() -> None:
    expected = {"accuracy": 0.7, "cross_entropy": 0.75, "calibration_error": 0.1}
    assert average_noise_levels(ROWS) == pytest.approx(expected)


def test_tables_hold_every_number_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    save_noise_levels(ROWS, tmp_path)
    assert [NoiseBucket(**row) for row in json.loads((tmp_path / "noise_levels.json").read_text())] == ROWS
    with (tmp_path / "noise_levels.csv").open() as file:
        assert [NoiseBucket(*(float(v) for v in row.values())) for row in csv.DictReader(file)] == ROWS
    assert "500 to 999     0.500          1.250              0.150" in format_noise_levels(ROWS)
    pytest.importorskip("matplotlib")
    plot_noise_levels(ROWS, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (1080, 360)
