import pytest
import torch

from hfdiff.evaluation import frechet_distance


def random_covariance(size: int, rank: int) -> torch.Tensor:
    factor = torch.randn(size, rank, dtype=torch.float64)
    return factor @ factor.T


def test_distance_of_commuting_gaussians_in_closed_form():
    """Diagonal covariances: Σ (m₁-m₂)² + (s₁-s₂)²."""
    m1, m2, s1, s2 = torch.rand(4, 6, dtype=torch.float64)
    expected = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum().item()
    assert frechet_distance(m1, s1.diag() ** 2, m2, s2.diag() ** 2) == pytest.approx(expected)


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_distance_is_zero_to_itself_and_symmetric(rank):
    mean, other = torch.randn(2, 5, dtype=torch.float64)
    first, second = random_covariance(5, rank), random_covariance(5, 5)
    assert frechet_distance(mean, first, mean, first) == pytest.approx(0, abs=1e-6)
    there, back = frechet_distance(mean, first, other, second), frechet_distance(other, second, mean, first)
    assert there == pytest.approx(back, rel=1e-6)
    assert there > 0


def test_distance_does_not_turn_with_the_axes():
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    m1, m2 = torch.randn(2, 5, dtype=torch.float64)
    c1, c2 = random_covariance(5, 5), random_covariance(5, 5)
    turned = frechet_distance(rotation @ m1, rotation @ c1 @ rotation.T, rotation @ m2, rotation @ c2 @ rotation.T)
    assert turned == pytest.approx(frechet_distance(m1, c1, m2, c2))


def test_features_of_different_networks_are_refused():
    with pytest.raises(ValueError, match="one network"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
