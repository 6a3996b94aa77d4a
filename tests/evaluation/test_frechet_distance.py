"""The Fréchet distance against closed forms and torchmetrics, and FID∞; its symmetries are in tests/test_metrics.py."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from hfdiff.data.image_source import images_in_memory
from hfdiff.evaluation.evaluate import evaluate
from hfdiff.evaluation.feature_set import Reference
from hfdiff.evaluation.features import ModuleFeatures
from hfdiff.evaluation.metrics import frechet_distance, frechet_distance_infinity, small_sample_warning
from hfdiff.evaluation.statistics import feature_statistics


def test_rotated_gaussians_in_closed_form():
    """C₁ = Q S₁² Qᵀ and C₂ = Q S₂² Qᵀ commute: ‖μ₁ - μ₂‖² + Σ (s₁ - s₂)², over ten decades of variances."""
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    m1, m2 = torch.randn(2, 40, dtype=torch.float64)
    s1, s2 = torch.logspace(-5, 0, 40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    c1, c2 = (rotation * s.square() @ rotation.T for s in (s1, s2))
    expected = ((m1 - m2).square().sum() + (s1 - s2).square().sum()).item()
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, abs=1e-8)


def test_two_by_two_that_do_not_commute_in_closed_form():
    """tr (C₁C₂)^{1/2} = √(tr C₁C₂ + 2 √det C₁C₂) in two dimensions."""
    c1 = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    c2 = torch.tensor([[1.0, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    product = c1 @ c2
    overlap = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (c1.trace() + c2.trace() - 2 * overlap).item()
    assert frechet_distance(zero, c1, zero, c2) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("count", "others"), [(10, 10), (10, 400), (400, 10)])
def test_fewer_images_than_features_in_closed_form(count, others):
    """C₁ = AᵀA and C₂ = BᵀB of low rank: tr (C₁C₂)^{1/2} is the sum of the singular values of the small A Bᵀ."""
    real, fake = torch.randn(count, 300, dtype=torch.float64), torch.randn(others, 300, dtype=torch.float64)
    a, b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (real, fake))
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    expected = (real.mean(dim=0) - fake.mean(dim=0)).square().sum() + a.square().sum() + b.square().sum() - 2 * overlap
    found = frechet_distance(*feature_statistics(real)[:2], *feature_statistics(fake)[:2])
    assert found == pytest.approx(expected.item(), rel=1e-11)


def test_images_that_are_all_alike_have_a_distance():
    """C₁ = 0: what is left is ‖μ₁ - μ₂‖² + tr C₂."""
    mean, zero = torch.ones(3), torch.zeros(3, 3)
    assert frechet_distance(mean, zero, 0 * mean, torch.eye(3)) == pytest.approx(6)
    assert frechet_distance(mean, torch.eye(3), 0 * mean, zero) == pytest.approx(6)
    assert frechet_distance(mean, zero, mean, zero) == 0


def test_arrays_of_numpy():
    mean, covariance = np.zeros(3, np.float32), np.eye(3)
    assert frechet_distance(mean, covariance, mean + 1, 4 * covariance) == pytest.approx(6)
    features = np.random.default_rng(0).normal(size=(30, 3))
    tensors = [torch.from_numpy(array) for array in (features, mean, covariance)]
    torch.manual_seed(1)
    found = frechet_distance_infinity(features, mean, covariance)
    torch.manual_seed(1)
    assert found == frechet_distance_infinity(*tensors)


@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_is_refused(place):
    arrays = [torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(3)]
    arrays[place] = arrays[place] * torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        frechet_distance(*arrays)


class Pixels(nn.Module):
    """A network whose features are smooth functions of the first pixels."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1)[:, : self.num_features].double() / 60).sin()


def test_equals_torchmetrics_with_the_same_module():
    images = torch.randint(256, (2, 64, 3, 4, 4), dtype=torch.uint8)
    metric = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    for part, real in zip(images, (True, False)):
        metric.update(part, real=real)
    reference, samples = (feature_statistics(Pixels()(part)) for part in images)
    assert frechet_distance(*samples[:2], *reference[:2]) == pytest.approx(metric.compute().item(), abs=1e-6)


class Convolution(nn.Module):
    """Features of colour images, in the precision of its weights, which torchmetrics changes with its own."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.to(self.layers[0].weight.dtype) / 127.5 - 1)


@torch.no_grad()
@pytest.mark.parametrize(("real", "fake"), [(40, 70), (8, 9)])
def test_evaluation_equals_torchmetrics_with_a_convolution(real, fake):
    """From images to number, with more and with fewer images than features."""
    network = Convolution().eval()
    metric = FrechetInceptionDistance(feature=network, input_img_size=(3, 9, 7)).set_dtype(torch.float64)
    images = {True: torch.randint(256, (real, 3, 9, 7), dtype=torch.uint8)}
    images[False] = torch.randint(200, (fake, 3, 9, 7), dtype=torch.uint8)
    for is_real, part in images.items():
        metric.update(part, real=is_real)
    reference, extractor = Reference(images_in_memory(images[True])), ModuleFeatures(network, "convolution")
    report = evaluate(images_in_memory(images[False]), reference, extractor, ["fid"])
    assert report.metrics["fid"] == pytest.approx(metric.compute().item(), abs=1e-6)


def test_extrapolation_removes_the_bias_of_few_images():
    """Samples of the reference's own distribution, 16 features: the distance at N images is far from 0, FID∞ is not."""
    mean, covariance = torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    biased, extrapolated = [], []
    for _ in range(20):
        features = torch.randn(160, 16, dtype=torch.float64)
        biased.append(frechet_distance(mean, covariance, *feature_statistics(features)[:2]))
        extrapolated.append(frechet_distance_infinity(features, mean, covariance))
    biased, extrapolated = torch.tensor(biased), torch.tensor(extrapolated)
    assert biased.mean() > 0.3
    assert extrapolated.mean().abs() < 0.15 * biased.mean()


def test_extrapolation_draws_from_its_generator():
    features, mean, covariance = torch.randn(60, 3), torch.zeros(3), torch.eye(3)
    one, same, other = (
        frechet_distance_infinity(features, mean, covariance, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert one == same != other


def test_few_images_are_warned_of():
    assert small_sample_warning(10_000, 2048) is not None
    assert small_sample_warning(10_240, 2048) is None
    with pytest.warns(UserWarning, match="19 images are few .* take 20 or more"):
        frechet_distance_infinity(torch.randn(19, 4), torch.zeros(4), torch.eye(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance_infinity(torch.randn(20, 4), torch.zeros(4), torch.eye(4))


@pytest.mark.parametrize(
    ("features", "points", "message"),
    [
        (torch.ones(20, 4), 1, "`num_points`"),
        (torch.ones(9, 4), 5, "at least 10"),
        (torch.ones(20, 3), 5, "one network"),
    ],
)
def test_what_cannot_be_extrapolated_is_refused(features, points, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance_infinity(features, torch.zeros(4), torch.eye(4), num_points=points)
