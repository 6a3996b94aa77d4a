from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from gaussian_mixture import ExactModel, Mixture
from torch import Tensor

from hfdiff import DDPMScheduler
from hfdiff.convert.ncsn import load_model
from hfdiff.schedulers.noise import geometric_sigmas, ncsnv2_num_levels, solve_step_size
from hfdiff.schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler

DATA = Path(__file__).parents[1] / "data"
MODES, WEIGHTS = torch.tensor([-5.0, 5.0], dtype=torch.float64), torch.tensor([0.8, 0.2], dtype=torch.float64)


def two_modes_score(x: Tensor, sigma: float) -> Tensor:
    """∇ log of 0.8 N(-5, 1 + σ²) + 0.2 N(5, 1 + σ²)."""
    distance, variance = MODES - x, 1 + sigma**2
    belongs = (WEIGHTS.log() - distance**2 / (2 * variance)).softmax(dim=-1)
    return (belongs * distance).sum(dim=-1, keepdim=True) / variance


def sample_two_modes(scheduler: AnnealedLangevinScheduler, start: float, count: int = 10_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64) * start
    for t in scheduler.timesteps:
        score = two_modes_score(x, float(scheduler.sigmas[t]))
        x = scheduler.step(score, t, x, generator=generator).prev_sample
    return x.flatten()


# --- levels and step sizes -------------------------------------------------------------------------------------------


def test_geometric_sigmas_have_the_ends_and_one_ratio() -> None:
    sigmas = geometric_sigmas(0.01, 50, 232)
    ratios = sigmas[1:] / sigmas[:-1]
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([0.01, 50.0], dtype=torch.float64))
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


@pytest.mark.parametrize(("ends", "levels"), [((0.01, 0.01), 10), ((1.0, 0.1), 10), ((0.0, 1.0), 10), ((0.1, 1.0), 1)])
def test_levels_that_are_none_are_refused(ends: tuple[float, float], levels: int) -> None:
    with pytest.raises(ValueError, match=r"`sigma_min` and `sigma_max`|`num_levels`"):
        geometric_sigmas(*ends, levels)


@pytest.mark.parametrize(
    ("sigma_max", "levels", "steps", "published"),
    [(50, 232, 5, 6.2e-6), (90, 500, 5, 3.3e-6), (190, 1086, 3, 1.8e-6), (348, 2311, 3, 0.9e-6)],
)
def test_solved_step_sizes_are_those_of_the_paper(sigma_max: float, levels: int, steps: int, published: float) -> None:
    # Song & Ermon 2020, table 3: CIFAR-10, CelebA, LSUN and FFHQ, all from sigma_min = 0.01
    assert solve_step_size(geometric_sigmas(0.01, sigma_max, levels), steps) == pytest.approx(published, rel=0.02)


def test_the_number_of_levels_grows_with_the_dimension_as_in_the_paper() -> None:
    # Song & Ermon 2020, table 3, chose these by eye on the same curve
    published = {(50, 3 * 32**2): 232, (90, 3 * 64**2): 500, (190, 3 * 128**2): 1086, (348, 3 * 256**2): 2311}
    for (sigma_max, dim), levels in published.items():
        assert ncsnv2_num_levels(0.01, sigma_max, dim) == pytest.approx(levels, rel=0.06)


# --- exact answers ---------------------------------------------------------------------------------------------------


def test_langevin_dynamics_without_annealing_keeps_the_wrong_weights() -> None:
    scheduler = AnnealedLangevinScheduler(2, 0.3, 0.301, steps_per_level=200, step_size=0.05)
    scheduler.set_timesteps()
    x = sample_two_modes(scheduler, start=20.0, count=4000)
    assert abs(x[x > 0].var() - 1) < 0.2  # each mode is found
    assert abs((x > 0).double().mean() - 0.5) < 0.05  # as often as by the symmetric start, and not 0.2 of the time


@pytest.mark.parametrize(("sampling", "steps"), [("langevin", 10), ("consistent", 3), ("predictor_corrector", 3)])
def test_annealing_finds_the_weights_of_far_modes(sampling: str, steps: int) -> None:
    scheduler = AnnealedLangevinScheduler(150, 0.01, 20, steps_per_level=steps, sampling=sampling)
    scheduler.set_timesteps()
    x = sample_two_modes(scheduler, start=scheduler.init_noise_sigma)
    right = x[x > 0]
    assert abs(len(right) / len(x) - 0.2) < 0.03
    assert abs(right.mean() - 5) < 0.1
    assert abs(right.var() - 1) < 0.15


def stationary_variance(ratio: float) -> float:
    """The variance that Langevin steps of α = ratio keep on N(0, 1), estimated over many steps and images."""
    scheduler = AnnealedLangevinScheduler(2, 1.0, 1.0001, steps_per_level=200, step_size=ratio, denoise_final=False)
    scheduler.set_timesteps()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    kept = []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(-x, t, x, generator=generator).prev_sample
        if i >= 100:
            kept.append(x.var())
    return float(torch.stack(kept).mean())


def test_the_stationary_variance_is_that_of_the_step_size() -> None:
    # x' = (1 - α) x + √(2α) z keeps 2α / (1 - (1 - α)²) = 1 / (1 - α/2), not the 1 of the target
    for ratio in (0.1, 0.2, 0.4):
        assert stationary_variance(ratio) == pytest.approx(1 / (1 - ratio / 2), rel=0.01)


def test_the_bias_of_the_stationary_variance_falls_at_first_order() -> None:
    first, half = stationary_variance(0.4) - 1, stationary_variance(0.2) - 1
    assert first / half == pytest.approx(2, rel=0.2)  # (1/0.8 - 1) / (1/0.9 - 1) = 2.25


# --- the updates -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arrays() -> tuple[Tensor, Tensor, Tensor]:
    x, output, noise = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, output, noise


def test_a_langevin_step_is_that_of_the_paper(arrays: tuple[Tensor, Tensor, Tensor]) -> None:
    x, score, noise = arrays
    scheduler = AnnealedLangevinScheduler(10, 0.01, 1.0, steps_per_level=2, step_size=2e-5)
    scheduler.set_timesteps()
    alpha = 2e-5 * (0.01 * 100 ** (7 / 9)) ** 2 / 0.01**2
    moved = scheduler.step(score, 7, x, variance_noise=noise).prev_sample
    torch.testing.assert_close(moved, x + alpha * score + (2 * alpha) ** 0.5 * noise)


def test_the_loop_ends_with_a_denoising_call_of_its_own(arrays: tuple[Tensor, Tensor, Tensor]) -> None:
    x, score, _ = arrays
    scheduler = AnnealedLangevinScheduler(3, 0.1, 1.0, steps_per_level=2, step_size=1e-3)
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == [2, 2, 1, 1, 0, 0, 0]
    for t in scheduler.timesteps[:-1]:
        scheduler.step(score, t, x)
    output = scheduler.step(score, 0, x)
    torch.testing.assert_close(output.prev_sample, x + 0.01 * score)
    torch.testing.assert_close(output.pred_original_sample, output.prev_sample)
    plain = AnnealedLangevinScheduler(3, 0.1, 1.0, steps_per_level=2, step_size=1e-3, denoise_final=False)
    plain.set_timesteps()
    assert plain.timesteps.tolist() == [2, 2, 1, 1, 0, 0]


def test_consistent_sampling_meets_every_level_exactly() -> None:
    scheduler = AnnealedLangevinScheduler(12, 0.01, 2.0, steps_per_level=3, sampling="consistent")
    scheduler.set_timesteps()
    levels = scheduler.sigmas[scheduler.timesteps].tolist()
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t, sigma, following in zip(scheduler.timesteps[:-1], levels[:-1], levels[1:]):
        # All data at 0, so x = σ z and s = -x/σ²: what a unit of old and of new noise becomes
        old = scheduler.step(-one / sigma, t, sigma * one, variance_noise=zero).prev_sample
        scheduler._step_index -= 1
        new = scheduler.step(zero, t, zero, variance_noise=one).prev_sample
        torch.testing.assert_close(old**2 + new**2, one * following**2)


def test_the_predictor_takes_the_variance_between_two_levels(arrays: tuple[Tensor, Tensor, Tensor]) -> None:
    x, score, noise = arrays
    scheduler = AnnealedLangevinScheduler(3, 0.1, 10.0, steps_per_level=1, sampling="predictor_corrector")
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == [2, 1, 0]
    moved = [scheduler.step(score, t, x, variance_noise=noise).prev_sample for t in (2, 1, 0)]
    torch.testing.assert_close(moved[0], x + 99 * score + 99**0.5 * noise)
    torch.testing.assert_close(moved[1], x + 0.99 * score + 0.99**0.5 * noise)
    torch.testing.assert_close(moved[2], x + 0.01 * score)  # the last one denoises


def test_the_corrector_steps_by_the_norms(arrays: tuple[Tensor, Tensor, Tensor]) -> None:
    x, score, noise = arrays
    scheduler = AnnealedLangevinScheduler(3, 0.1, 10.0, steps_per_level=2, sampling="predictor_corrector", snr=0.16)
    scheduler.set_timesteps()
    norms = [torch.linalg.vector_norm(array, dim=(1, 2, 3)).mean() for array in (noise, score)]
    alpha = 2 * (0.16 * norms[0] / norms[1]) ** 2
    moved = scheduler.step(score, 2, x, variance_noise=noise).prev_sample
    torch.testing.assert_close(moved, x + alpha * score + (2 * alpha) ** 0.5 * noise)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_stands_for_the_same_score(kind: str, arrays: tuple[Tensor, Tensor, Tensor]) -> None:
    x, score, noise = arrays
    sigma = 10**0.5
    x0, eps = x + sigma**2 * score, -sigma * score
    v = (eps - sigma * x0) / (1 + sigma**2) ** 0.5  # √ᾱ ε - √(1-ᾱ) x_0 with ᾱ = 1/(1+σ²)
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": v}
    steps = []
    for prediction, output in (("score", score), (kind, outputs[kind])):
        scheduler = AnnealedLangevinScheduler(3, 1.0, 10.0, step_size=0.5, prediction_type=prediction)
        scheduler.set_timesteps()
        steps.append(scheduler.step(output, 1, x, variance_noise=noise).prev_sample)
    torch.testing.assert_close(*steps)


# --- counting calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["langevin", "consistent", "predictor_corrector"])
@pytest.mark.parametrize("calls", [11, 12, 37, 51, 250])
def test_the_calls_are_as_many_as_asked_for_and_visit_both_ends(calls: int, sampling: str) -> None:
    scheduler = AnnealedLangevinScheduler(10, 0.01, 1.0, steps_per_level=5, sampling=sampling)
    scheduler.set_timesteps(calls)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == scheduler.num_inference_steps == calls
    assert timesteps == sorted(timesteps, reverse=True)
    assert {timesteps[0], timesteps[-1]} == {9, 0}


def test_respaced_levels_get_a_step_size_of_their_own_unless_one_is_given() -> None:
    solved = AnnealedLangevinScheduler(100, 0.01, 10.0)
    solved.set_timesteps(51)
    assert len(solved.step_sizes) == 10
    assert float(solved.step_sizes[0]) == pytest.approx(solve_step_size(solved.sigmas[solved.timesteps.unique()], 5))
    given = AnnealedLangevinScheduler(100, 0.01, 10.0, step_size=3e-5)
    given.set_timesteps(51)
    assert float(given.step_sizes[0]) == pytest.approx(3e-5)


# --- the bridge ------------------------------------------------------------------------------------------------------


def test_bridged_betas_are_saved_and_timesteps_may_be_any_number(tmp_path: Path) -> None:
    scheduler = AnnealedLangevinScheduler(sigma_schedule="from_betas", trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert AnnealedLangevinScheduler.from_pretrained(tmp_path).betas.tolist() == scheduler.betas.tolist() == [0.1, 0.3]
    # ᾱ = 0.9 and 0.63, and the model is given √ᾱ x_t
    for timestep, alpha_bar in ((0, 0.9), (np.float32(0.0), 0.9), (np.int64(1), 0.63), (torch.tensor(1.0), 0.63)):
        scaled = scheduler.scale_model_input(torch.ones(1, 1, 1, 1, dtype=torch.float64), timestep)
        assert scaled.item() == pytest.approx(alpha_bar**0.5)


@pytest.mark.parametrize("family", [DDPMScheduler, diffusers.DDPMScheduler])
def test_the_levels_of_a_ddpm_are_those_of_its_noise(family: type) -> None:
    ddpm = family()
    scheduler = AnnealedLangevinScheduler.from_config(ddpm.config)
    assert (scheduler.config.prediction_type, len(scheduler)) == ("epsilon", 1000)
    x0, noise = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 200, 500, 800])
    noisy = scheduler.add_noise(x0, noise, t)
    scaled = torch.stack([scheduler.scale_model_input(image, step) for image, step in zip(noisy, t)])
    torch.testing.assert_close(scaled, ddpm.add_noise(x0, noise, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_ddpm_model_samples_its_distribution_by_annealed_langevin(kind: str) -> None:
    ddpm = DDPMScheduler(prediction_type=kind)
    mixture = Mixture(ddpm.alphas_cumprod)
    scheduler = AnnealedLangevinScheduler.from_config(ddpm.config, sampling="consistent")
    scheduler.set_timesteps(600)
    model = ExactModel(kind).attach(mixture)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 1, 2, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    mean = mixture.weights @ mixture.means
    torch.testing.assert_close(x.flatten(1).mean(0), mean, rtol=0, atol=0.06)
    spread = (mixture.means - mean).T @ (mixture.weights[:, None] * (mixture.means - mean))
    cov = spread + (mixture.weights @ mixture.scales**2) * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(x.flatten(1).T), cov, rtol=0, atol=0.08)


def test_a_schedule_rescaled_to_zero_snr_keeps_its_levels() -> None:
    ddpm = DDPMScheduler(rescale_betas_zero_snr=True)
    scheduler = AnnealedLangevinScheduler.from_config(ddpm.config)
    alpha_bar = ddpm.alphas_cumprod[:-1]
    torch.testing.assert_close(scheduler.sigmas[:-1], ((1 - alpha_bar) / alpha_bar) ** 0.5)


# --- the originals ---------------------------------------------------------------------------------------------------


def frozen(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in np.load(DATA / name).items()}


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the reference's largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("ending", ["denoised", "plain"])
@torch.no_grad()
def test_a_trajectory_is_the_original_ncsnv2s(ending: str) -> None:
    arrays = frozen("ncsnv2_trajectory.npz")
    data = {"image_size": 28, "channels": 1, "logit_transform": False, "rescaled": False}
    levels = {"num_classes": 10, "sigma_begin": 1, "sigma_end": 0.01, "sigma_dist": "geometric"}
    network = {"ngf": 8, "normalization": "InstanceNorm++", "nonlinearity": "elu", "spec_norm": False}
    model = load_model(DATA / "ncsnv2_list.pt", {"data": data, "model": {**levels, **network}}, ema=False)
    scheduler = AnnealedLangevinScheduler(
        10, 0.01, 1.0, steps_per_level=3, step_size=1e-5, denoise_final=ending == "denoised"
    )
    scheduler.set_timesteps()
    torch.manual_seed(11)
    x, states = arrays["in.x"], []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
        states.append(x)
    assert largest_error(states[14], arrays["out.middle"]) < 1e-5
    assert largest_error(x, arrays[f"out.{ending}"]) < 1e-5


@pytest.mark.parametrize("index", range(4))
def test_predictor_and_corrector_are_those_of_score_sde(index: int) -> None:
    arrays = frozen("pc_steps.npz")
    x, score, noise = (arrays[f"in.{name}"] for name in ("x", "score", "noise"))
    t = int(arrays["in.t"][index] * 999)
    levels = {"num_train_timesteps": 1000, "sigma_min": 0.01, "sigma_max": 50.0, "sampling": "predictor_corrector"}
    predictor = AnnealedLangevinScheduler(**levels, steps_per_level=1, denoise_final=False)
    predictor.set_timesteps()
    moved = predictor.step(score, t, x, variance_noise=noise[0]).prev_sample
    assert largest_error(moved, arrays[f"out.ve.t{index}.reverse_diffusion.x"]) < 1e-5
    corrector = AnnealedLangevinScheduler(**levels, steps_per_level=3)
    corrector.set_timesteps()
    for z in noise:
        x = corrector.step(score, t, x, variance_noise=z).prev_sample
    assert largest_error(x, arrays[f"out.ve.t{index}.langevin.x"]) < 1e-5


# --- state and errors ------------------------------------------------------------------------------------------------


def sample_with(scheduler: AnnealedLangevinScheduler, generator: object, count: int) -> Tensor:
    scheduler.set_timesteps(23)
    x = torch.linspace(-1, 1, count * 4).reshape(count, 1, 2, 2) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(-x / (1 + float(scheduler.sigmas[t]) ** 2), t, x, generator=generator).prev_sample
    return x


def test_a_generator_decides_the_sample_and_a_list_one_for_each_image() -> None:
    scheduler = AnnealedLangevinScheduler(10, 0.01, 1.0)
    first, again = (sample_with(scheduler, torch.Generator().manual_seed(5), 2) for _ in range(2))
    assert torch.equal(first, again)  # set_timesteps resets the loop
    batch = sample_with(scheduler, [torch.Generator().manual_seed(seed) for seed in (1, 2)], 2)
    other = sample_with(scheduler, [torch.Generator().manual_seed(seed) for seed in (1, 3)], 2)
    assert torch.equal(batch[0], other[0])
    assert not torch.equal(batch[1], other[1])


def test_a_loop_may_begin_in_the_middle_of_a_level() -> None:
    scheduler = AnnealedLangevinScheduler(3, 0.1, 1.0, steps_per_level=2, step_size=1e-3)
    scheduler.set_timesteps()
    scheduler.set_begin_index(6)
    x = torch.ones(1, 1, 1, 1)
    torch.testing.assert_close(scheduler.step(-x, 0, x).prev_sample, 0.99 * x)  # the denoising call
    assert scheduler.step_index == 7


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sigma_min": 1.0, "sigma_max": 0.5}, "sigma_min"),
        ({"sigma_min": -1.0}, "sigma_min"),
        ({"sigma_min": 0.01, "step_size": 2.1e-4}, r"under 2 σ_min² = 0.0002"),
        ({"step_size": -1.0}, "step_size"),
        ({"steps_per_level": 0}, "steps_per_level"),
        ({"sampling": "gibbs"}, "sampling"),
        ({"sigma_schedule": "linear"}, "sigma_schedule"),
        ({"prediction_type": "prev_sample"}, "prediction_type"),
        ({"sigma_schedule": "from_betas", "sigma_max": 0.01}, "sigma_max"),
    ],
)
def test_settings_that_cannot_sample_are_refused(config: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AnnealedLangevinScheduler(**config)


def test_calls_too_few_and_shapes_that_do_not_fit_are_refused() -> None:
    scheduler = AnnealedLangevinScheduler(10, 0.01, 1.0, steps_per_level=5)
    with pytest.raises(ValueError, match=r"at least 11.* got 10"):
        scheduler.set_timesteps(10)
    scheduler.set_timesteps(21)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="`model_output` must have the sample's shape"):
        scheduler.step(x[..., :1], scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="`timestep` must be one of"):
        scheduler.step(x, 1, x)


def test_a_saved_scheduler_is_the_same(tmp_path: object) -> None:
    scheduler = AnnealedLangevinScheduler(12, 0.02, 3.0, steps_per_level=4, sampling="consistent", snr=0.2)
    scheduler.save_pretrained(tmp_path)
    loaded = AnnealedLangevinScheduler.from_pretrained(tmp_path)
    assert loaded.config.items() >= {k: v for k, v in scheduler.config.items() if not k.startswith("_")}.items()
    assert torch.equal(loaded.sigmas, scheduler.sigmas)
