"""Closed forms and cycles of the Gaussian process."""

from itertools import product

import numpy as np
import pytest
import torch

from hfdiff.schedulers.gaussian import (
    PREDICTION_TYPES,
    clip_x0_,
    convert,
    discretized_gaussian_log_likelihood,
    from_x0,
    normal_kl,
    posterior,
    to_x0,
)

ALPHA_BAR = torch.tensor([0.999, 0.5, 0.01], dtype=torch.float64).view(3, 1, 1, 1)


@pytest.fixture
def pair():
    x0 = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    eps = torch.randn_like(x0)
    return x0, eps, ALPHA_BAR**0.5 * x0 + (1 - ALPHA_BAR) ** 0.5 * eps


def truth(kind, x0, eps):
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": ALPHA_BAR**0.5 * eps - (1 - ALPHA_BAR) ** 0.5 * x0,
        "score": -eps / (1 - ALPHA_BAR) ** 0.5,
    }[kind]


@pytest.mark.parametrize(("source", "target"), list(product(PREDICTION_TYPES, PREDICTION_TYPES)))
def test_every_conversion_from_its_definition(pair, source, target):
    x0, eps, xt = pair
    converted = convert(truth(source, x0, eps), xt, ALPHA_BAR, source, target)
    torch.testing.assert_close(converted, truth(target, x0, eps))


def test_unknown_prediction_type_is_refused(pair):
    x0, _, xt = pair
    with pytest.raises(ValueError, match="prediction_type"):
        to_x0(x0, xt, 0.5, "noise")
    with pytest.raises(ValueError, match="prediction_type"):
        from_x0(x0, xt, 0.5, "noise")


def test_posterior_is_gaussian_conditioning():
    """(x_{t-1}, x_t) given x_0 is jointly Gaussian; conditioning it on x_t gives the posterior."""
    prev, alpha = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    x0, xt = 1.3, -0.4
    mean = torch.stack([prev**0.5 * x0, (alpha * prev) ** 0.5 * x0])
    var_prev, var_t, cov = 1 - prev, 1 - alpha * prev, alpha**0.5 * (1 - prev)
    result = posterior(alpha * prev, prev)
    expected = mean[0] + cov / var_t * (xt - mean[1])
    torch.testing.assert_close(result.on_x0 * x0 + result.on_xt * xt, expected)
    torch.testing.assert_close(result.variance, var_prev - cov**2 / var_t)


def test_normal_kl_agrees_with_torch():
    means, logs = torch.randn(2, 50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    first, second = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in zip(means, logs))
    expected = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(normal_kl(means[0], logs[0], means[1], logs[1]), expected)


def test_discretized_likelihood_sums_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, scale in ((0.1, 0.3), (-1.0, 0.05), (0.98, 0.01)):
        full = torch.full_like(levels, mean)
        logs = discretized_gaussian_log_likelihood(levels, full, torch.full_like(levels, scale).log())
        assert logs.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_likelihood_and_kl_match_guided_diffusion(data_dir):
    arrays = {key: torch.from_numpy(value) for key, value in np.load(data_dir / "discretized_gaussian.npz").items()}
    likelihood = discretized_gaussian_log_likelihood(arrays["in.x"], arrays["in.means"], arrays["in.log_scales"])
    torch.testing.assert_close(likelihood, arrays["out.log_likelihood"], rtol=1e-6, atol=1e-6)
    kl = normal_kl(*(arrays[f"in.kl_{name}"] for name in ("m1", "lv1", "m2", "lv2")))
    torch.testing.assert_close(kl, arrays["out.normal_kl"], rtol=1e-6, atol=1e-6)


def test_clipping():
    x0 = torch.tensor([[-3.0, 0.5, 2.0]])
    assert clip_x0_(x0.clone(), {}).tolist() == [[-3.0, 0.5, 2.0]]
    assert clip_x0_(x0.clone(), {"clip_sample": True}).tolist() == [[-1.0, 0.5, 1.0]]
    assert clip_x0_(x0.clone(), {"clip_sample": True, "clip_sample_range": 2.0}).tolist() == [[-2.0, 0.5, 2.0]]
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 2.0}
    assert clip_x0_(x0.clone(), dynamic).tolist() == [[-1.0, 0.25, 1.0]]
