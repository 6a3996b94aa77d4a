import importlib

import numpy as np
import pytest
import torch

from hfdiff.evaluation.precision_recall import density_coverage, precision_recall

module = importlib.import_module("hfdiff.evaluation.distances")


def test_by_hand_on_a_line():
    """k = 1. Real {0, 1, 4}: balls of radius 1, 1, 3 cover [-1, 7]. Fake {2, 5, 9}: 3, 3, 4 cover [-1, 13]."""
    real, fake = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[2.0], [5.0], [9.0]])
    assert precision_recall(real, fake, k=1) == pytest.approx((2 / 3, 1))
    assert precision_recall(fake, real, k=1) == pytest.approx((1, 2 / 3))


def test_balls_reach_the_kth_neighbour():
    """Real {0, 1, 3}: for k = 2 the radii are 3, 2 and 3 and cover [-3, 6]; for k = 1 they are 1, 1 and 2: [-1, 5]."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[-2.99], [-0.99], [4.99], [5.99], [6.01]])
    assert precision_recall(real, fake, k=2).precision == pytest.approx(4 / 5)
    assert precision_recall(real, fake, k=1).precision == pytest.approx(2 / 5)


def test_same_and_disjoint_sets():
    points = torch.randn(50, 4)
    assert precision_recall(points, points.flip(0)) == (1, 1)
    assert precision_recall(points, points + 100) == (0, 0)


def test_one_good_image_over_and_over_is_precise_without_recall():
    real = torch.randn(50, 4)
    collapsed = real[:1].repeat(20, 1)
    assert precision_recall(real, collapsed) == pytest.approx((1, 1 / 50))


def test_chunks_do_not_change_the_result(monkeypatch):
    real, fake = torch.randn(2, 60, 5)
    whole = precision_recall(real, fake), density_coverage(real, fake)
    monkeypatch.setattr(module, "CHUNK", 7 * 60)
    assert (precision_recall(real, fake), density_coverage(real, fake)) == whole


def test_density_and_coverage_by_hand_on_a_line():
    """k = 1. Real {0, 1, 5}: open balls (-1, 1), (0, 2), (1, 9). Fake {0.5, 2, 5, 9} are in 2, 1, 1 and 0 of them."""
    real, fake = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.5], [2.0], [5.0], [9.0]])
    assert density_coverage(real, fake, k=1) == (1, 1)
    assert density_coverage(real, fake[2:], k=1) == (1 / 2, 1 / 3)
    assert density_coverage(real, real, k=1) == (1, 1)


def test_density_and_coverage_are_plain_loops_with_ties():
    """Whole numbers around 0, many at one distance and some copied, so that distances are exact and borders matter."""
    half = torch.randint(-3, 4, (20, 2), generator=torch.Generator().manual_seed(0)).double()
    real, fake = torch.cat([half, -half]), torch.cat([half[:7], half[7:14] + 1])
    held, covered = 0, 0
    for i, x in enumerate(real):
        radius = sorted(float((x - other).norm()) for j, other in enumerate(real) if j != i)[2]
        inside = [float((x - y).norm()) < radius for y in fake]
        held, covered = held + sum(inside), covered + any(inside)
    assert density_coverage(real, fake, k=3) == pytest.approx((held / (3 * 14), covered / 40))


def test_an_outlier_adds_little_density_where_it_makes_all_precise():
    """Naeem et al. 2020, figure 3: one real image far away has a ball that holds every sample between."""
    real = torch.cat([torch.randn(99, 2), torch.tensor([[50.0, 0.0]])])
    fake = torch.randn(100, 2) * 0.1 + torch.tensor([20.0, 0.0])
    assert precision_recall(real, fake, k=5).precision == 1
    assert density_coverage(real, fake, k=5) == pytest.approx((1 / 5, 1 / 100))


def test_density_and_coverage_of_draws_of_one_density():
    """Density is 1 on average; coverage 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k)) (Naeem et al. 2020, lemma 2)."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 1000, 3, generator=generator).unbind()
    found = density_coverage(real, fake, k=5)
    expected = 1 - np.prod([(1000 - i) / (2000 - i) for i in range(1, 6)])
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 1000) ** 0.5)


def test_equals_the_original_evaluator(data_dir):
    frozen = np.load(data_dir / "evaluator.npz")
    found = precision_recall(frozen["in.ref_pool"], frozen["in.sample_pool"], k=3)
    assert found.precision == pytest.approx(frozen["out.precision"], abs=1e-12)
    assert found.recall == pytest.approx(frozen["out.recall"], abs=1e-12)


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        (torch.ones(9, 2), torch.ones(9, 3), 3, "one width"),
        (torch.ones(9, 2), torch.ones(3, 2), 3, "`fake`.*at least 4"),
        (torch.ones(9, 2), torch.ones(9, 2), 0, "`k`"),
        (torch.full((9, 2), float("inf")), torch.ones(9, 2), 3, "`real` must be finite"),
    ],
)
def test_what_does_not_fit_is_refused(real, fake, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, fake, k)
