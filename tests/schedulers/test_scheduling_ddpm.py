import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from torch.utils._pytree import tree_map

from hfdiff import DDPMScheduler
from hfdiff.schedulers.gaussian import posterior
from hfdiff.schedulers.scheduling_ddpm import VARIANCE_TYPES, DDPMSchedulerOutput

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # OpenAI's names and ours
PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample", "PREVIOUS_X": "prev_sample"}


def openai_scheduler(schedule: str, total: int, **config) -> DDPMScheduler:
    ends = {"beta_start": 0.1 / total, "beta_end": 20 / total}
    return DDPMScheduler(num_train_timesteps=total, beta_schedule=SCHEDULES[schedule], **ends, **config)


def assert_close(actual, expected, tolerance):
    """Relative to the reference's largest value."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def chain_arrays(scheduler: DDPMScheduler) -> dict[str, torch.Tensor]:
    """The chain's posterior, ascending in t, read through the public `q_posterior` in float64."""
    timesteps = scheduler.timesteps.flip(0)
    one, zero = torch.ones(len(timesteps), 1, dtype=torch.float64), torch.zeros(len(timesteps), 1, dtype=torch.float64)
    on_x0, variance, log_variance = scheduler.q_posterior(one, zero, timesteps)
    on_xt, _, _ = scheduler.q_posterior(zero, one, timesteps)
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    arrays = {
        "alphas_cumprod": alpha_bar,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": log_variance,
        "posterior_mean_coef1": on_x0,
        "posterior_mean_coef2": on_xt,
        "timestep_map": timesteps,
    }
    return {name: array.flatten() for name, array in arrays.items()}


@pytest.mark.parametrize("name", ["schedules", "respacing"])
def test_schedules_match_guided_diffusion_in_float64(data_dir, name):
    arrays = np.load(data_dir / f"{name}.npz")
    prefixes = {key.rsplit(".", 1)[0] for key in arrays.files if key.split(".")[1] in SCHEDULES}
    for prefix in prefixes:
        _, schedule, total, *respacing = prefix.split(".")
        scheduler = openai_scheduler(schedule, int(total))
        if respacing:
            scheduler.set_timesteps(respacing=respacing[0])
        for array, values in chain_arrays(scheduler).items():
            if f"{prefix}.{array}" in arrays:
                assert_close(values, arrays[f"{prefix}.{array}"], 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("clip", [False, True])
def test_p_mean_variance_matches_guided_diffusion(data_dir, schedule, prediction, variance, clip):
    arrays = {key: torch.from_numpy(value) for key, value in np.load(data_dir / "p_mean_variance.npz").items()}
    output = arrays[f"in.{schedule}.model_output"].clone()
    if prediction == "START_X":
        output[:, :3] = arrays[f"in.{schedule}.x0_output"]
    if prediction == "PREVIOUS_X":
        output[:, :3] = arrays[f"in.{schedule}.xprev_output"]
    if variance.startswith("FIXED"):
        output = output[:, :3]
    scheduler = openai_scheduler(
        schedule, 1000, prediction_type=PREDICTIONS[prediction], variance_type=variance.lower(), clip_sample=clip
    )
    result = scheduler.p_mean_variance(output, arrays["in.t"], arrays[f"in.{schedule}.x_t"])
    prefix = f"out.{schedule}.{prediction}"
    assert_close(result.mean, arrays[f"{prefix}.clip{clip:d}.mean"], 1e-6)
    assert_close(result.pred_original_sample, arrays[f"{prefix}.clip{clip:d}.pred_xstart"], 1e-6)
    if prediction == "EPSILON":
        for field in ("variance", "log_variance"):
            expected = arrays[f"{prefix}.{variance}.{field}"]
            assert_close(getattr(result, field).reshape(expected.shape), expected, 1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_forward_process_matches_guided_diffusion(data_dir, schedule):
    arrays = {key: torch.from_numpy(value) for key, value in np.load(data_dir / "p_mean_variance.npz").items()}
    x0, noise, xt = (arrays[f"in.{schedule}.{name}"] for name in ("x_start", "noise", "x_t"))
    scheduler = openai_scheduler(schedule, 1000)
    assert_close(scheduler.q_sample(x0, arrays["in.t"], noise), arrays[f"out.{schedule}.q_sample"], 1e-6)
    mean, variance, log_variance = scheduler.q_posterior(x0, xt, arrays["in.t"])
    prefix = f"out.{schedule}.q_posterior"
    assert_close(mean, arrays[f"{prefix}.mean"], 1e-6)
    assert_close(variance.expand_as(xt), arrays[f"{prefix}.variance"].expand_as(xt), 1e-6)
    assert_close(log_variance.expand_as(xt), arrays[f"{prefix}.log_variance_clipped"].expand_as(xt), 1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_steps_equal_diffusers(prediction_type, beta_schedule, variance_type, spacing):
    config = {
        "prediction_type": prediction_type,
        "beta_schedule": beta_schedule,
        "variance_type": variance_type,
        "timestep_spacing": spacing,
    }
    theirs = diffusers.DDPMScheduler(**config)
    ours = DDPMScheduler.from_config(theirs.config)
    sample = torch.randn(2, 3, 4, 4)
    output = torch.randn(2, 6 if variance_type == "learned_range" else 3, 4, 4)
    for steps in (7, 50):
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        for t in ours.timesteps[1:-1]:  # the ends differ on purpose: float32 schedules, and OpenAI's variance at t = 0
            expected = theirs.step(output, t, sample, generator=torch.Generator().manual_seed(1))
            result = ours.step(output, t, sample, generator=torch.Generator().manual_seed(1))
            # diffusers' schedules are float32; 1-ᾱ and 1-α lose three digits near t = 0
            torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample, rtol=1e-3, atol=1e-3)


def test_step_is_mean_plus_guidance_plus_noise():
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[3])
    output, sample, noise, guidance = torch.randn(4, 2, 3, 4, 4, dtype=torch.float64)
    gaussian = scheduler.p_mean_variance(output, t, sample)
    result = scheduler.step(output, t, sample, variance_noise=noise, guidance=guidance)
    expected = gaussian.mean + gaussian.variance * guidance + gaussian.variance**0.5 * noise
    torch.testing.assert_close(result.prev_sample, expected)
    torch.testing.assert_close(result.pred_original_sample, gaussian.pred_original_sample)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_last_step_has_no_noise_but_guidance(variance_type):
    """Σ at t = 0 is 0 for fixed_small and the posterior variance of the step before for the others (OpenAI's)."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(respacing="10")
    channels = 2 if variance_type.startswith("learned") else 1
    sample, guidance = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    output = -torch.ones(2, channels, 4, 4, dtype=torch.float64)  # learned_range: the lower end
    plain = scheduler.step(output, 0, sample).prev_sample
    again = scheduler.step(output, 0, sample, variance_noise=torch.randn_like(sample)).prev_sample
    torch.testing.assert_close(plain, again, rtol=0, atol=0)
    moved = scheduler.step(output, 0, sample, guidance=guidance).prev_sample - plain
    second = scheduler.alphas_cumprod[scheduler.timesteps[-2:]]
    variance = posterior(second[0], second[1]).variance
    if variance_type == "learned":
        variance = torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    expected = torch.zeros_like(guidance) if variance_type.startswith("fixed_small") else variance * guidance
    torch.testing.assert_close(moved, expected)


def test_timesteps_in_tensors_give_the_same_step():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps[[0, 7, 19]]
    output, sample, noise, guidance = torch.randn(4, 3, 1, 4, 4, dtype=torch.float64)
    together = scheduler.step(output, timesteps, sample, variance_noise=noise, guidance=guidance).prev_sample
    for i, t in enumerate(timesteps):
        rows = [tensor[i : i + 1] for tensor in (output, sample, noise, guidance)]
        alone = scheduler.step(rows[0], t, rows[1], variance_noise=rows[2], guidance=rows[3]).prev_sample
        torch.testing.assert_close(together[i : i + 1], alone)


def test_generators_make_images_independent_of_their_batch():
    scheduler = DDPMScheduler()
    output, sample = torch.randn(2, 3, 1, 4, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = scheduler.step(output, 500, sample, generator=generators).prev_sample
    alone = scheduler.step(output[1:2], 500, sample[1:2], generator=torch.Generator().manual_seed(1)).prev_sample
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_step_keeps_the_dtype(dtype):
    output, sample = torch.randn(2, 2, 1, 4, 4).to(dtype)
    noise = torch.randn(2, 1, 4, 4)
    scheduler = DDPMScheduler()
    result = scheduler.step(output, 500, sample, variance_noise=noise.to(dtype)).prev_sample
    assert result.dtype == dtype
    exact = scheduler.step(output.double(), 500, sample.double(), variance_noise=noise.to(dtype).double()).prev_sample
    tolerance = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


def test_velocity_and_add_noise():
    scheduler = DDPMScheduler()
    x0, noise = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([3, 700])
    alpha_bar = scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    torch.testing.assert_close(scheduler.add_noise(x0, noise, t), alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise)
    velocity = scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(velocity, alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * x0)


def test_from_config_works_in_both_directions():
    ours = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0)
    theirs = diffusers.DDIMScheduler.from_config(ours.config)
    again = DDPMScheduler.from_config(theirs.config)
    assert dict(again.config) | {"_use_default_values": None} == dict(ours.config) | {"_use_default_values": None}
    assert diffusers.EulerDiscreteScheduler in ours.compatibles
    assert DDPMScheduler in ours.compatibles


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 5, "respacing": "5"}, "exactly one"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"timesteps": [1, 2, 3]}, "timesteps"),
        ({"timesteps": [1000, 2]}, "timesteps"),
        ({"timesteps": []}, "timesteps"),
        ({"respacing": "ddim300"}, "respacing"),
    ],
)
def test_impossible_timesteps_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        DDPMScheduler().set_timesteps(**arguments)


def test_wrong_tensors_are_refused():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    sample = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="model_output"):
        scheduler.step(torch.zeros(2, 6, 4, 4), 0, sample)
    with pytest.raises(ValueError, match="guidance"):
        scheduler.step(sample, 0, sample, guidance=sample[:1])
    with pytest.raises(ValueError, match="variance_noise"):
        scheduler.step(sample, 100, sample, variance_noise=sample[:1])
    with pytest.raises(ValueError, match="timestep"):
        scheduler.step(sample, 101, sample)
    for name in ("variance_type", "prediction_type", "timestep_spacing", "beta_schedule"):
        with pytest.raises(ValueError, match=name):
            DDPMScheduler(**{name: "wrong"})


def test_the_output_of_a_step_is_a_base_output_in_every_way() -> None:
    first, second = torch.zeros(2), torch.ones(2)
    output = DDPMSchedulerOutput(first, pred_original_sample=second)
    assert isinstance(output, BaseOutput)
    assert list(output) == ["prev_sample", "pred_original_sample"]
    assert output["prev_sample"] is output.prev_sample is output[0] is output.to_tuple()[0] is first
    assert len(DDPMSchedulerOutput(first)) == 1  # as in every BaseOutput, None is no item
    output.prev_sample = second
    assert output[0] is second
    for copied in (pickle.loads(pickle.dumps(output)), tree_map(torch.clone, output)):
        assert isinstance(copied, DDPMSchedulerOutput)
        torch.testing.assert_close(dict(copied), dict(output))
