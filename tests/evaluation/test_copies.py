import importlib

import pytest
import torch
from torch.nn.functional import interpolate

from hfdiff.evaluation import copy_ratios, copy_threshold, measure_copies, nearest_neighbours, share_of_copies

module = importlib.import_module("hfdiff.evaluation.copies")


def pictures(count, seed):
    """Smooth grey pictures, uint8, (N, 1, 16, 16)."""
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (interpolate(coarse, size=16, mode="bicubic").clamp(0, 1) * 255).round().byte()


def test_by_hand_on_a_line():
    """Training {0, 1, 4, 9}. From 1.5: .5, 1.5, 2.5; from 9: 0, 5, 8; from 2.5, 1.5, 1.5, 2.5."""
    training = torch.tensor([[0.0], [1.0], [4.0], [9.0]])
    samples = torch.tensor([[1.5], [9.0], [2.5]])
    found = nearest_neighbours(samples, training, k=3)
    assert found.distances.tolist() == [[0.5, 1.5, 2.5], [0, 5, 8], [1.5, 1.5, 2.5]]
    assert found.indices[:2].tolist() == [[1, 0, 2], [3, 2, 1]]
    assert found.ratios.tolist() == pytest.approx([0.5 / 1.5, 0, 1.5 / (5.5 / 3)])
    assert share_of_copies(found.ratios, 0.4) == pytest.approx(2 / 3)


def test_half_the_mean_of_two_is_a_third_of_the_second():
    training = torch.tensor([[0.0], [4.0]])
    assert copy_ratios(torch.tensor([[1.0]]), training, k=2).item() == 0.5


def test_planted_duplicates_and_no_others_are_found():
    training, fresh = pictures(400, 0), pictures(100, 1)
    samples = fresh.clone()
    samples[10:17] = training[50:57]
    found = measure_copies(samples, training)
    assert found.share == 0.07
    assert found.neighbours.indices[10:17, 0].tolist() == list(range(50, 57))
    assert (found.neighbours.ratios == 0).nonzero().flatten().tolist() == list(range(10, 17))
    assert found[1:3] == (0.5, None)
    assert measure_copies(fresh, training).share == 0


@pytest.mark.parametrize("change", ["noise", "shift", "darker"])
def test_duplicates_with_small_changes_are_found(change):
    training, samples = pictures(400, 0), pictures(100, 1)
    planted = training[50:60].double()
    if change == "noise":
        planted = planted + 12 * torch.randn(planted.shape, dtype=torch.float64)
    elif change == "shift":
        planted[..., 1:] = planted[..., :-1].clone()
    else:
        planted = planted * 0.92
    samples[:10] = planted.round().clamp(0, 255).byte()
    found = measure_copies(samples, training, held_out=pictures(100, 2))
    assert found.share == 0.1
    assert found.held_out_share == 0


def test_noise_has_the_ratio_of_its_size():
    """Unit normal rows of width D: a copy with noise s is at s √D, all others at about √(2 + s²) √D."""
    training = torch.randn(60, 20_000)
    noise = torch.tensor([[0.1], [0.5], [0.9]])
    expected = noise / (2 + noise**2).sqrt()
    mean = (expected + 49) / 50  # the copied one is among the 50
    found = copy_ratios(training[:3] + noise * torch.randn(3, 20_000), training)
    torch.testing.assert_close(found, (expected / mean).flatten().double(), rtol=0.02, atol=0)


@pytest.mark.parametrize("width", [1, 2])
def test_fresh_points_pass_with_a_known_probability(width):
    """Points laid densely and at random: the volumes to the first two have a uniform quotient, so d_1 / d_2 ≤ 1/3 has
    probability 3^-width."""
    training, samples = torch.rand(20_000, width), 0.05 + 0.9 * torch.rand(4000, width)
    share = share_of_copies(copy_ratios(samples, training, k=2))
    expected = 3.0**-width
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_held_out_images_lower_the_threshold_where_they_must():
    """In two dimensions, chance alone passes the fixed threshold; held-out points put it where 1% of them do."""
    training, samples, held_out = torch.rand(2000, 2), torch.rand(4000, 2), torch.rand(4000, 2)
    assert measure_copies(samples, training).share > 0.1
    found = measure_copies(samples, training, held_out)
    assert found.threshold < 0.5
    assert found.held_out_share == 0.01
    assert abs(found.share - 0.01) < 4 * (2 * 0.01 / 4000) ** 0.5
    samples[:400] = training[:400]
    assert measure_copies(samples, training, held_out).share == pytest.approx(0.109, abs=0.005)


def test_threshold_is_a_low_quantile_but_never_above_the_fixed_one():
    ratios = torch.arange(1, 301).flip(0) / 300
    assert copy_threshold(ratios) == pytest.approx(3 / 300)
    assert copy_threshold(ratios[-20:]) == pytest.approx(1 / 300)
    assert copy_threshold(torch.full((200,), 0.9)) == 0.5
    assert copy_threshold(ratios, threshold=0.001) == 0.001


def test_near_duplicates_far_from_zero_do_not_cancel():
    """Distances of 1e-7 at 1e3 from the origin are far below the rounding of squares, 1e-5 in float64's 1e6."""
    training = 1e3 + torch.randn(100, 8, dtype=torch.float64)
    step = torch.full((8,), 1e-7, dtype=torch.float64)
    found = nearest_neighbours(training[:5] + step, training, k=10)
    torch.testing.assert_close(found.distances[:, 0], step.norm().expand(5), rtol=1e-5, atol=0)
    assert found.indices[:, 0].tolist() == list(range(5))


def test_bytes_are_compared_exactly():
    """Float32 would lose a difference of one level in 3,072 bright pixels."""
    training = torch.full((60, 3072), 255, dtype=torch.uint8)
    training[torch.arange(60), torch.arange(60)] = 0
    sample = training[:1].clone()
    sample[0, 100] = 254
    found = nearest_neighbours(sample, training, k=60)
    assert found.distances[0, 0] == 1
    assert found.distances[0, 1:].unique().tolist() == [(2 * 255**2 + 1) ** 0.5]


def test_blocks_do_not_change_the_result(monkeypatch):
    samples, training = torch.randn(45, 6), torch.randn(70, 6)
    whole = nearest_neighbours(samples, training, k=20)
    monkeypatch.setattr(module, "BLOCK", 8)
    blocks = nearest_neighbours(samples, training, k=20)
    assert torch.equal(blocks.distances, whole.distances)
    assert torch.equal(blocks.indices, whole.indices)


def test_equal_training_images_leave_a_copy_a_copy():
    training = torch.ones(60, 3)
    assert copy_ratios(torch.ones(1, 3), training).tolist() == [0]
    assert copy_ratios(torch.zeros(1, 3), training).tolist() == [1]


@pytest.mark.parametrize(
    ("samples", "training", "k", "message"),
    [
        (torch.ones(9, 2), torch.ones(9, 3), 2, "one width"),
        (torch.ones(9, 2), torch.ones(9, 2), 10, "`k` must be from 2 to the 9"),
        (torch.ones(9, 2), torch.ones(9, 2), 1, "`k`"),
        (torch.full((9, 2), float("nan")), torch.ones(9, 2), 2, "`samples` must be finite"),
        (torch.ones(0, 2), torch.ones(9, 2), 2, "`samples`.*at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(samples, training, k, message):
    with pytest.raises(ValueError, match=message):
        copy_ratios(samples, training, k)


def test_shares_of_nothing_are_refused():
    for call in (lambda: share_of_copies(torch.ones(0)), lambda: share_of_copies(torch.ones(3), 2.0)):
        with pytest.raises(ValueError, match="`ratios` must hold some and `threshold`"):
            call()
    with pytest.raises(ValueError, match="`held_out_ratios`"):
        copy_threshold(torch.ones(0))
