import math

import numpy as np
import pytest
import torch

from hfdiff.schedulers.noise import BETA_SCHEDULES, make_betas, rescale_zero_terminal_snr, space_timesteps


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_betas_are_variances_in_float64(schedule):
    betas = make_betas(schedule, 1000)
    assert betas.shape == (1000,)
    assert betas.dtype == torch.float64
    assert (betas > 0).all()
    assert (betas <= 1).all()


def test_closed_forms_of_ho_et_al():
    torch.testing.assert_close(make_betas("const", 4, beta_end=0.3), torch.full((4,), 0.3, dtype=torch.float64))
    expected = torch.tensor([1 / 4, 1 / 3, 1 / 2, 1], dtype=torch.float64)
    torch.testing.assert_close(make_betas("jsd", 4), expected)
    torch.testing.assert_close(make_betas("linear", 3, 0.1, 0.3), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    expected = torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64)
    torch.testing.assert_close(make_betas("quad", 3, 0.01, 0.09), expected)
    warm = make_betas("warmup10", 100, 0.1, 0.5)
    torch.testing.assert_close(warm[[0, 9, 10, 99]], torch.tensor([0.1, 0.5, 0.5, 0.5], dtype=torch.float64))
    assert len(make_betas("warmup50", 100).unique()) == 50


def test_cosine_product_is_the_cosine():
    betas = make_betas("squaredcos_cap_v2", 1000)
    alpha_bar = torch.cumprod(1 - betas, 0)
    for t in (0, 99, 500, 998):
        u = (t + 1) / 1000
        expected = (math.cos((u + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
        assert alpha_bar[t].item() == pytest.approx(expected, rel=1e-9)
    assert betas[-1] == 0.999


def test_rescaled_betas_end_in_pure_noise():
    betas = make_betas("linear", 100)
    rescaled = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert rescaled[-1] == 0
    assert rescaled[0].item() == pytest.approx(1 - betas[0].item())


def test_space_timesteps_matches_guided_diffusion(data_dir):
    arrays = np.load(data_dir / "respacing.npz")
    maps = [key for key in arrays.files if key.endswith("timestep_map")]
    assert len(maps) > 10
    for key in maps:
        _, _, total, spec, _ = key.split(".")
        assert space_timesteps(int(total), spec) == arrays[key].tolist(), key


def test_space_timesteps_takes_counts_as_numbers():
    assert space_timesteps(300, [10, 15, 20]) == space_timesteps(300, "10,15,20")


@pytest.mark.parametrize("spec", ["ddim300", "ddim99", "600,10", "1001", "many", "ddim", "-3"])
def test_impossible_respacing_is_refused(spec):
    with pytest.raises(ValueError, match="respacing"):
        space_timesteps(1000, spec)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="beta_schedule"):
        make_betas("liner", 1000)
