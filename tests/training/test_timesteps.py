"""Importance sampling of timesteps: exact expectations, then guided-diffusion's probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hfdiff.data.labelled import LabelledImages
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.batches import BatchStream
from hfdiff.training.losses import weighted_mean
from hfdiff.training.timesteps import LogSNRSampler, LossSecondMomentSampler


def filled(losses: list[float], **options) -> LossSecondMomentSampler:
    """A sampler that has seen one loss per timestep, as often as it remembers."""
    sampler = LossSecondMomentSampler(len(losses), **options)
    for _ in range(sampler.losses.shape[1]):
        sampler.update(torch.arange(len(losses)), torch.tensor(losses))
    return sampler


def test_probabilities_follow_the_root_of_the_second_moment() -> None:
    sampler = filled([1.0, 2.0, 5.0, 0.0], uniform_probability=0.2)
    expected = 0.8 * torch.tensor([1.0, 2.0, 5.0, 0.0], dtype=torch.float64) / 8 + 0.05
    torch.testing.assert_close(sampler.probabilities(), expected)
    assert sampler.probabilities().sum().item() == pytest.approx(1, abs=1e-15)


def test_the_expected_weighted_loss_is_the_uniform_one() -> None:
    sampler = filled([0.1, 7.0, 300.0, 2.0, 1.0])
    losses = torch.tensor([0.3, 5.0, 100.0, 4.0, 0.0])
    timestep, weight = sampler.draw(5000, torch.Generator().manual_seed(0))
    weights = torch.zeros(5).scatter_(0, timestep, weight)
    assert weights[0] > 0  # every timestep came, by the uniform share
    expectation = (sampler.probabilities() * weights * losses).sum()
    assert expectation.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    assert weighted_mean(losses[timestep], weight).item() == pytest.approx(losses.mean().item(), rel=0.05)


def test_until_every_history_is_full_timesteps_are_uniform() -> None:
    sampler = LossSecondMomentSampler(3, history=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([9.0, 9.0, 1.0, 1.0, 1.0]))
    timestep, weight = sampler.draw(100, torch.Generator().manual_seed(0))
    assert set(timestep.tolist()) == {0, 1, 2}
    assert torch.equal(weight, torch.ones(100))
    sampler.update(torch.tensor([2]), torch.tensor([1.0]))
    assert sampler.probabilities()[0] > 0.8


def test_the_oldest_loss_is_forgotten_and_one_that_is_not_finite_never_learned() -> None:
    sampler = filled([1.0, 1.0], history=2)
    sampler.update(torch.tensor([0, 0, 0]), torch.tensor([3.0, 4.0, torch.nan]))
    root = 12.5**0.5
    assert sampler.probabilities()[0].item() == pytest.approx(0.999 * root / (root + 1) + 0.0005)


def test_a_loaded_state_draws_the_same() -> None:
    sampler, other = filled([1.0, 2.0, 3.0]), LossSecondMomentSampler(3)
    other.load_state_dict({name: value.clone() for name, value in sampler.state_dict().items()})
    for mine, theirs in zip(*(s.draw(50, torch.Generator().manual_seed(1)) for s in (sampler, other))):
        assert torch.equal(mine, theirs)


def test_probabilities_match_guided_diffusion(data_dir: Path) -> None:
    arrays = np.load(data_dir / "loss_second_moment.npz")
    timestep, losses = (torch.from_numpy(arrays[f"in.{name}"]) for name in ("timestep", "losses"))
    for count in (20, 60, 120):
        sampler = LossSecondMomentSampler(4)
        sampler.update(timestep[:count], losses[:count])
        np.testing.assert_allclose(sampler.probabilities(), arrays[f"out.{count}"], rtol=1e-12)


def test_batches_carry_the_weights_of_their_timesteps() -> None:
    data = LabelledImages(torch.zeros(8, 1, 2, 2), None, [])
    sampler = filled([1.0, 3.0])
    batch = BatchStream(data, 8, 2, seed=0, time_sampler=sampler)(0)
    torch.testing.assert_close(batch.weight.double(), 1 / (2 * sampler.probabilities()[batch.timestep]))
    assert BatchStream(data, 8, 2, seed=0)(0).weight is None


def test_log_snr_is_drawn_uniformly_between_its_bounds() -> None:
    alpha_bar = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    sampler = LogSNRSampler(alpha_bar, bounds=(-4.0, 2.0), uniform_probability=0.0)
    timestep, weight = sampler.draw(20_000, torch.Generator().manual_seed(0))
    assert weight is None
    log_snr = (alpha_bar / (1 - alpha_bar)).log()[timestep].sort().values
    quantiles = torch.linspace(-4, 2, len(log_snr))
    assert (log_snr - quantiles).abs().max() < 0.08  # Kolmogorov: 1.6 of 6/√20,000, and a level's width


def test_a_share_of_timesteps_stays_uniform_outside_the_bounds() -> None:
    alpha_bar = DDPMScheduler().alphas_cumprod
    sampler = LogSNRSampler(alpha_bar, uniform_probability=0.25)
    outside = (alpha_bar / (1 - alpha_bar)).log() > 1
    assert sampler.probabilities[outside].sum().item() == pytest.approx(0.25 * outside.double().mean().item())
    assert sampler.probabilities.sum().item() == pytest.approx(1)
