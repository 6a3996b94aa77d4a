"""DDIM; its steps are compared with the original's, guided and respaced, in tests/convert/test_convert_folders.py."""

import itertools

import diffusers
import pytest
import torch

from hfdiff import DDIMScheduler, DDPMScheduler


@pytest.fixture
def step_input():
    return torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_a_stride_is_diffusers_ddim_with_clipped_output(step_input, prediction_type, eta):
    output, sample = step_input
    ours = DDIMScheduler(prediction_type=prediction_type)
    theirs = diffusers.DDIMScheduler.from_config(ours.config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    for t in ours.timesteps[:-1]:  # diffusers adds noise at the last step, too
        noise = torch.randn_like(sample)
        expected = theirs.step(
            output, t, sample, eta, use_clipped_model_output=True, variance_noise=noise if eta else None
        )
        step = ours.step(output, t, sample, eta, variance_noise=noise)
        torch.testing.assert_close(step.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.pred_original_sample, expected.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_the_exact_noise_leads_back_to_the_image():
    """With ε known, one step from any level gives that of the level before, √ᾱ x_0 + √(1-ᾱ) ε, with ᾱ in float32."""
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(respacing="5,3,7")
    x0, eps = torch.rand(1, 3, 4, 4, dtype=torch.float64) * 2 - 1, torch.randn(1, 3, 4, 4, dtype=torch.float64)
    chain = scheduler.timesteps.tolist()
    for t, previous in itertools.pairwise(chain):
        step = scheduler.step(eps, t, scheduler.q_sample(x0, t, eps))
        torch.testing.assert_close(step.prev_sample, scheduler.q_sample(x0, previous, eps), rtol=0, atol=1e-5)
    step = scheduler.step(eps, chain[-1], scheduler.q_sample(x0, chain[-1], eps))
    torch.testing.assert_close(step.prev_sample, x0, rtol=0, atol=1e-9)


def test_eta_one_is_ddpms_step(step_input):
    """At η = 1 its noise has the posterior's variance, and the mean is the posterior's."""
    output, sample = step_input
    ddim, ddpm = DDIMScheduler(), DDPMScheduler()
    noise = torch.randn_like(sample)
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(10)
    for t in ddim.timesteps:
        expected = ddpm.step(output, t, sample, variance_noise=noise).prev_sample
        torch.testing.assert_close(
            ddim.step(output, t, sample, 1.0, variance_noise=noise).prev_sample, expected, rtol=1e-4, atol=1e-4
        )


def test_noise_is_the_generators(step_input):
    output, sample = step_input
    scheduler = DDIMScheduler()
    steps = [
        scheduler.step(output, 500, sample, 1.0, generator=torch.Generator().manual_seed(seed)).prev_sample
        for seed in (0, 0, 1)
    ]
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])
    (prev, _) = scheduler.step(output, 500, sample, return_dict=False)
    assert torch.equal(prev, scheduler.step(output, 500, sample).prev_sample)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"eta": -0.1}, "`eta` must be at least 0"),
        ({"timestep": 1000}, "`timestep` must be one of"),
        ({"guidance": torch.zeros(1)}, "`guidance` must have the sample's shape"),
        ({"model_output": torch.zeros(2, 1, 4, 4)}, "`model_output` must have the sample's shape"),
    ],
)
def test_bad_arguments_are_refused(step_input, change, match):
    output, sample = step_input
    with pytest.raises(ValueError, match=match):
        DDIMScheduler().step(**{"model_output": output, "timestep": 500, "sample": sample, **change})


def test_respacing_in_the_config():
    """Without a count it is the chain; other counts are spaced by its rule."""
    for kind in (DDPMScheduler, DDIMScheduler):
        scheduler = kind(respacing="10,15,20")
        scheduler.set_timesteps()
        chain = scheduler.timesteps.tolist()
        assert len(chain) == 45
        scheduler.set_timesteps(45)
        assert scheduler.timesteps.tolist() == chain
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.tolist() == [999, 749, 500, 250, 0]
        scheduler = kind(respacing="ddim25")
        scheduler.set_timesteps(50)
        assert scheduler.timesteps.tolist() == list(range(980, -1, -20))
        with pytest.raises(ValueError, match="exactly one"):
            kind().set_timesteps()
