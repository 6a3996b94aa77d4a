import numpy as np
import pytest
import torch

from hfdiff.evaluation.kernel_distance import (
    clip_maximum_mean_discrepancy,
    kernel_inception_distance,
    subset_kernel_distances,
)


def expected_kernel(mean1: float, mean2: float) -> float:
    """E (xy + 1)³ = 1 + 3 E xy + 3 E x²y² + E x³y³ for independent x ~ N(mean1, 1), y ~ N(mean2, 1)."""
    moments = [(m, 1 + m**2, m**3 + 3 * m) for m in (mean1, mean2)]
    first, second, third = (a * b for a, b in zip(*moments))
    return 1 + 3 * first + 3 * second + third


def test_by_hand():
    """Real {1, 2}, fake {0, 1}, D = 1: within, k(1, 2) = 27 and k(0, 1) = 1; across, the mean of 1, 8, 1 and 27."""
    real, fake = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    expected = 27 + 1 - 2 * (1 + 8 + 1 + 27) / 4
    assert kernel_inception_distance(real, fake, subset_size=2, num_subsets=1) == pytest.approx(expected)


def test_width_divides_the_kernel():
    """The same points with every coordinate doubled up: x·y doubles, and so does D."""
    real, fake = torch.randn(2, 20, 3, dtype=torch.float64)
    once, twice = (
        kernel_inception_distance(x.repeat(1, n), y.repeat(1, n), subset_size=20, num_subsets=1)
        for x, y, n in ((real, fake, 1), (real, fake, 2))
    )
    assert once == pytest.approx(twice)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_is_unbiased(shift):
    """Its mean over independent sets is the closed-form MMD², zero for equal distributions, even for 5 images."""
    real, fake = torch.randn(2, 1000, 5, 1, dtype=torch.float64)
    found = torch.stack(
        [subset_kernel_distances(x, y, subset_size=5, num_subsets=1)[0] for x, y in zip(real, fake + shift)]
    )
    truth = expected_kernel(0, 0) + expected_kernel(shift, shift) - 2 * expected_kernel(0, shift)
    assert abs(found.mean().item() - truth) < 4 * found.std().item() / len(found) ** 0.5


def test_generator_draws_the_subsets():
    real, fake = torch.randn(2, 40, 6)
    one, same, other = (
        kernel_inception_distance(real, fake, subset_size=10, num_subsets=3, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("real", "fake", "size", "message"),
    [
        (torch.ones(4, 2), torch.ones(4, 3), 2, "one width"),
        (torch.ones(4, 2), torch.ones(3, 2), 4, "`subset_size` must be from 2 to 3"),
        (torch.ones(4, 2), torch.ones(3, 2), 1, "subset_size"),
        (torch.ones(4), torch.ones(3, 2), 2, "`real`"),
        (torch.ones(4, 2), torch.full((3, 2), float("nan")), 2, "`fake` must be finite"),
    ],
)
def test_what_does_not_fit_is_refused(real, fake, size, message):
    with pytest.raises(ValueError, match=message):
        kernel_inception_distance(real, fake, subset_size=size)


def test_cmmd_of_two_gaussians():
    """E exp(-d²/200) of a difference N(m, 2) is (1 + 2/100)^(-1/2) exp(-m²/(2 (100 + 2))); itself counts with 1/N."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, n, 1, generator=generator, dtype=torch.float64).unbind()
    same, apart = 1.02**-0.5, 1.02**-0.5 * np.exp(-(5**2) / 204)
    expected = 1000 * 2 * ((1 - 1 / n) * same + 1 / n - apart)
    assert clip_maximum_mean_discrepancy(real, fake + 5) == pytest.approx(expected, rel=0.02)


def test_cmmd_of_equal_distributions_is_above_zero_for_few_images():
    """On the unit sphere E‖x - y‖² = 2, so 10 (1/N + 1/M) ; the mean of 100 draws is off by about 2%."""
    points = torch.randn(100, 300, 64, generator=torch.Generator().manual_seed(0))
    points = torch.nn.functional.normalize(points, dim=2)
    found = np.mean([clip_maximum_mean_discrepancy(draw[:200], draw[200:]) for draw in points])
    assert found == pytest.approx(10 * (1 / 200 + 1 / 100), rel=0.05)
