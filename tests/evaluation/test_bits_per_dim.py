"""The variational bound against closed forms, and against guided-diffusion's numbers."""

import csv
import json
import math
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor

from hfdiff.cli import main
from hfdiff.evaluation import bits_per_dim, spread_timesteps
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64; 1-ᾱ loses digits at the cleanest timesteps


class GaussianData:
    """Pixels x_0 ~ N(0, s²) and their exact denoiser E[x_0 | x_t], which is linear."""

    std = 0.3

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler

    def __call__(self, xt: Tensor, t: Tensor) -> SimpleNamespace:
        alpha_bar = self.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        x0, eps = (alpha_bar.sqrt() * self.std**2 * xt / variance, (1 - alpha_bar).sqrt() * xt / variance)
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
        kind = self.scheduler.config.prediction_type
        return SimpleNamespace(sample={"epsilon": eps, "sample": x0, "v_prediction": v}[kind])


def second_moments(scheduler: DDPMScheduler) -> tuple[Tensor, Tensor]:
    """Four images of one pixel and their noise, with exactly the second moments of x_0 and ε; KLs see no more."""
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    x0 = (GaussianData.std * signs[:, 0]).view(-1, 1, 1, 1)
    return x0, signs[:, 1].view(-1, 1, 1, 1).expand(len(scheduler.timesteps), -1, -1, -1, -1)


def closed_form(alpha_bar: Tensor, variance_type: str) -> tuple[Tensor, Tensor]:
    """L_1, L_2, ... of Gaussian data in bits, and the mean squared error of ε, for levels ᾱ of a chain, ascending."""
    here, before = alpha_bar[1:], alpha_bar[:-1]
    beta = 1 - here / before
    posterior = beta * (1 - before) / (1 - here)
    error = GaussianData.std**2 * (1 - alpha_bar) / (alpha_bar * GaussianData.std**2 + 1 - alpha_bar)  # Var[x_0 | x_t]
    of_mean = beta**2 * before / (1 - here) ** 2 * error[1:]
    variance = posterior if variance_type == "fixed_small" else beta
    nats = 0.5 * (torch.log(variance / posterior) - 1 + (posterior + of_mean) / variance)
    return nats / math.log(2), alpha_bar / (1 - alpha_bar) * error


@pytest.mark.parametrize("respacing", [None, "7"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_terms_of_gaussian_data_have_their_closed_form(
    prediction_type: str, variance_type: str, respacing: str | None
) -> None:
    scheduler = DDPMScheduler(40, prediction_type=prediction_type, variance_type=variance_type)
    if respacing:
        scheduler.set_timesteps(respacing=respacing)
    x0, noise = second_moments(scheduler)
    result = bits_per_dim(GaussianData(scheduler), scheduler, x0, noise=noise, clip_denoised=False)
    alpha_bar = scheduler.alphas_cumprod[result.timesteps]
    terms, mse = closed_form(alpha_bar, variance_type)
    torch.testing.assert_close(result.vb[1:], terms, **EXACT)
    torch.testing.assert_close(result.mse, mse, **EXACT)
    last = alpha_bar[-1]
    prior = 0.5 * (last * GaussianData.std**2 - last - torch.log(1 - last)) / math.log(2)
    torch.testing.assert_close(result.prior, prior, **EXACT)
    torch.testing.assert_close(result.total, result.prior + result.vb.sum(), **EXACT)
    torch.testing.assert_close(result.per_image.mean(), result.total, **EXACT)


def test_the_bound_of_the_exact_model_lies_closely_over_the_entropy() -> None:
    scheduler = DDPMScheduler(300, beta_end=0.06, variance_type="fixed_large")
    x0 = GaussianData.std * torch.randn(200, 1, 2, 2, dtype=torch.float64)
    x0 = ((x0 + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    total = bits_per_dim(GaussianData(scheduler), scheduler, x0).total.item()
    density = x0.square().mean() / (2 * GaussianData.std**2) + 0.5 * math.log(2 * math.pi * GaussianData.std**2)
    entropy = density.item() / math.log(2) + math.log2(127.5)  # of bins 2/255 wide, about 7.3
    assert entropy < total < 1.03 * entropy


def test_an_image_known_for_certain_costs_its_decoder_alone() -> None:
    scheduler = DDPMScheduler(50, prediction_type="sample")
    x0 = torch.tensor([[0.2], [-0.4]], dtype=torch.float64).mul(127.5).round().div(127.5).view(2, 1, 1, 1)
    result = bits_per_dim(lambda xt, t: SimpleNamespace(sample=x0), scheduler, x0)
    torch.testing.assert_close(result.vb[1:], torch.zeros(49, dtype=torch.float64), rtol=0, atol=1e-12)
    std = math.sqrt(scheduler.q_posterior(x0, x0, 1)[1].item())  # L_0 takes the posterior variance of the step before
    within = math.erf(1 / 255 / std / math.sqrt(2))
    assert result.vb[0].item() == pytest.approx(-math.log2(within), abs=1e-3)  # Φ is approximate


def test_terms_left_out_are_interpolated() -> None:
    scheduler = DDPMScheduler(400, beta_schedule="squaredcos_cap_v2")
    x0, noise = second_moments(scheduler)
    full = bits_per_dim(GaussianData(scheduler), scheduler, x0, noise=noise, clip_denoised=False)
    some = spread_timesteps(scheduler, 40)
    assert 30 <= len(some) <= 40
    assert some[:2] == [0, 1]
    assert some[-1] == 399
    part = bits_per_dim(
        GaussianData(scheduler), scheduler, x0, noise=lambda t: noise[t], timesteps=some, clip_denoised=False
    )
    assert torch.equal(part.vb, full.vb[some])
    assert part.total.item() == pytest.approx(full.total.item(), rel=5e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_chains_have_a_bound(count: int) -> None:
    scheduler = DDPMScheduler(count)
    x0, noise = second_moments(scheduler)
    result = bits_per_dim(GaussianData(scheduler), scheduler, x0, noise=noise, clip_denoised=False)
    assert result.total.isfinite()
    assert result.vb.shape == (count,)
    assert spread_timesteps(scheduler, 3) == list(range(count))


def test_noise_is_drawn_from_the_noisiest_timestep_on_whatever_the_batches() -> None:
    scheduler = DDPMScheduler(6)
    x0 = torch.rand(5, 1, 2, 2) * 2 - 1
    torch.manual_seed(7)
    noise = torch.stack([torch.randn(5, 1, 2, 2) for _ in range(6)]).flip(0)
    recorded = bits_per_dim(GaussianData(scheduler), scheduler, x0, noise=noise)
    torch.manual_seed(7)
    drawn = bits_per_dim(GaussianData(scheduler), scheduler, x0, batch_size=2)
    generator = torch.Generator().manual_seed(7)
    generated = bits_per_dim(GaussianData(scheduler), scheduler, x0, generator=generator)
    for other in (drawn, generated):
        for ours, theirs in zip(recorded, other):
            torch.testing.assert_close(ours, theirs)


BETAS = {"linear": {"beta_start": 0.004, "beta_end": 0.8}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}
MODELS = ["epsilon.fixed_small", "epsilon.fixed_large", "sample.learned", "epsilon.learned_range"]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("model", [*MODELS, "prev_sample.fixed_large"])
@pytest.mark.parametrize("chain", ["linear.full", "linear.5", "cosine.full", "cosine.5"])
def test_bounds_match_guided_diffusion(data_dir: Path, chain: str, model: str, clip: bool) -> None:
    arrays = np.load(data_dir / "bits_per_dim.npz")
    schedule, respacing = chain.split(".")
    prediction_type, variance_type = model.split(".")
    scheduler = DDPMScheduler(25, prediction_type=prediction_type, variance_type=variance_type, **BETAS[schedule])
    if respacing != "full":
        scheduler.set_timesteps(respacing=respacing)
    outputs = dict(zip(scheduler.timesteps.tolist()[::-1], torch.from_numpy(arrays[f"in.{chain}.{model}"])))
    result = bits_per_dim(
        lambda xt, t: SimpleNamespace(sample=outputs[int(t[0])]),
        scheduler,
        torch.from_numpy(arrays["in.x0"]),
        noise=torch.from_numpy(arrays[f"in.{chain}.noise"]),
        clip_denoised=clip,
    )
    names = {"per_image": "total_bpd", "prior": "prior_bpd", "vb": "vb", "mse": "mse", "x0_mse": "xstart_mse"}
    for ours, theirs in names.items():
        expected = arrays[f"out.{chain}.{model}.{'clip' if clip else 'free'}.{theirs}"]
        if ours != "per_image":
            expected = expected.mean(axis=0)
        np.testing.assert_allclose(getattr(result, ours), expected, rtol=1e-5, atol=1e-5, err_msg=ours)


def make_unet() -> UNet2DModel:
    return UNet2DModel(
        8, 1, 2, block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=4, num_class_embeds=10,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    ).eval()  # fmt: skip


def make_diffusers_scheduler() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(
        num_train_timesteps=4, beta_schedule="squaredcos_cap_v2", variance_type="learned_range"
    )


def test_a_diffusers_model_and_scheduler_have_a_bound() -> None:
    theirs, unet = make_diffusers_scheduler(), make_unet()
    scheduler = DDPMScheduler.from_config(theirs.config)
    x0 = torch.rand(3, 1, 8, 8) * 2 - 1
    noise = torch.randn(4, 3, 1, 8, 8)
    one, other = (
        bits_per_dim(unet, scheduler, x0, noise=noise, class_labels=torch.tensor(labels)).per_image
        for labels in ([0, 1, 2], [0, 2, 2])
    )
    assert one.isfinite().all()
    assert torch.equal(one == other, torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match=r"scheduler.*from_config"):
        bits_per_dim(unet, theirs, x0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": torch.rand(2, 1, 2, 2) * 255}, r"x0.*127\.5"),
        ({"x0": torch.zeros(2, 2)}, r"x0.*\(2, 2\)"),
        ({"x0": torch.zeros(0, 1, 2, 2)}, "x0"),
        ({"noise": torch.zeros(3, 2, 1, 2, 2)}, r"noise.*\(4, 2, 1, 2, 2\)"),
        ({"timesteps": [0, 3]}, r"timesteps.*\[0, 1, 3\]"),
        ({"timesteps": [0, 1, 3, 9]}, r"timesteps.*9"),
    ],
)
def test_what_fits_no_chain_is_refused(changes: dict, message: str) -> None:
    scheduler = DDPMScheduler(4)
    arguments = {"x0": torch.zeros(2, 1, 2, 2), **changes}
    with pytest.raises(ValueError, match=message):
        bits_per_dim(GaussianData(scheduler), scheduler, **arguments)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(make_unet(), make_diffusers_scheduler()).save_pretrained(folder)
    return folder


def test_the_command_reports_the_bound(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num", "7", "--respacing", "3", "--seed", "5", "--output", str(tmp_path)]
    assert main(["bits-per-dim", "--pipeline", str(pipeline), *flags]) == 0
    digits = load_digits()
    x0 = torch.from_numpy(digits.images[1500:1507, None] / 8 - 1).float()
    scheduler = DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    scheduler.set_timesteps(respacing="3")
    expected = bits_per_dim(
        UNet2DModel.from_pretrained(pipeline, subfolder="unet"),
        scheduler,
        x0,
        generator=torch.Generator().manual_seed(5),
        class_labels=torch.from_numpy(digits.target[1500:1507]),
    )
    summary = json.loads((tmp_path / "bits_per_dim.json").read_text())
    assert summary["bits_per_dim"] == pytest.approx(expected.total.item(), rel=1e-6)
    assert f"{expected.total.item():.4f} ±" in capsys.readouterr().out
    with (tmp_path / "bits_per_dim.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["timestep"]) for row in rows] == expected.timesteps.tolist() == [0, 2, 3]
    total = sum(float(row["bits_per_dim"]) for row in rows) + summary["prior"]
    assert total == pytest.approx(summary["bits_per_dim"], rel=1e-6)
    assert (tmp_path / "bits_per_dim.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num", "0"], "--num"),
        (["--respacing", "9"], "respacing"),
        (["--dataset_name", "nowhere.parquet"], "nowhere.parquet"),
        (["--pipeline", "."], "--pipeline.*UNet"),
    ],
)
def test_the_command_ends_with_a_message(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert main(["bits-per-dim", "--pipeline", str(pipeline), *output, *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
