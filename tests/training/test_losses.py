"""The losses: against closed forms, then guided-diffusion's numbers."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hfdiff.models.noisy_classifier import NoisyClassifier
from hfdiff.schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.losses import (
    classification_loss,
    ddpm_loss,
    ddpm_losses,
    guided_denoising_loss,
    simple_losses,
    weighted_mean,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, a few operations


def batch_of(size: tuple[int, ...], scheduler: DDPMScheduler, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(size, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    return x0, torch.randint(len(scheduler), size[:1], generator=generator), noise


def always(output: Tensor):
    return lambda xt, t: SimpleNamespace(sample=output)


# --- denoising -------------------------------------------------------------------------------------------------------


def target(kind: str, scheduler: DDPMScheduler, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    before = torch.cat([torch.ones(1), scheduler.alphas_cumprod])[t].view(-1, 1, 1, 1)
    xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    beta = 1 - alpha_bar / before
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0,
        "prev_sample": (beta * before.sqrt() * x0 + (1 - before) * (1 - beta).sqrt() * xt) / (1 - alpha_bar),
    }[kind]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "prev_sample"])
def test_ddpm_loss_is_zero_for_the_target_and_its_energy_for_a_zero_model(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    drawn = batch_of((4, 2, 3, 3), scheduler)
    aim = target(kind, scheduler, *drawn)
    perfect = ddpm_loss(always(aim), scheduler, *drawn)
    torch.testing.assert_close(perfect, torch.zeros_like(perfect), **EXACT)
    zeros = always(torch.zeros_like(aim))
    losses = aim.square().flatten(1).mean(1)
    torch.testing.assert_close(ddpm_losses(zeros, scheduler, *drawn), losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ddpm_loss(zeros, scheduler, *drawn), losses.mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_gives_the_same_loss_whatever_is_predicted(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="squaredcos_cap_v2")
    x0, _, noise = batch_of((4, 3, 3, 3), scheduler)
    t = torch.tensor([0, 200, 500, 998])  # SNR on both sides of γ
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    guess = x0 + torch.randn_like(x0)
    xt = scheduler.q_sample(x0, t, noise)
    eps = (xt - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
    prediction = target(kind, scheduler, guess, t, eps)
    weight = (alpha_bar / (1 - alpha_bar)).clamp(max=5.0)
    expected = (weight * (guess - x0).square()).flatten(1).mean(1)
    losses = ddpm_losses(always(prediction), scheduler, x0, t, noise, snr_gamma=5.0)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


def test_min_snr_of_pure_noise_is_finite() -> None:
    for kind, weight in {"epsilon": 1.0, "sample": 0.0, "v_prediction": 0.0}.items():
        scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
        x0, _, noise = batch_of((1, 1, 2, 2), scheduler)
        t = torch.tensor([999])
        aim = target(kind, scheduler, x0, t, noise)
        losses = simple_losses(aim + 1, scheduler, x0, t, noise, snr_gamma=5.0)
        torch.testing.assert_close(losses, torch.full_like(losses, weight), **EXACT)


def test_the_bound_of_the_true_posterior_is_zero() -> None:
    scheduler = DDPMScheduler(100, variance_type="learned_range")
    x0, _, noise = batch_of((3, 1, 2, 2), scheduler)
    t = torch.tensor([1, 50, 99])
    true = torch.cat([noise, torch.full_like(noise, -1)], dim=1)  # -1 is the posterior's variance
    for loss_type in ("vlb", "hybrid"):
        losses = ddpm_losses(always(true), scheduler, x0, t, noise, loss_type=loss_type)
        torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-9)
    wide = torch.cat([noise, torch.ones_like(noise)], dim=1)  # 1 is β
    ratio = torch.exp(scheduler.q_posterior(x0, x0, t)[2].flatten() - scheduler.betas[t].log())
    bits = 100 * 0.5 * (ratio - 1 - ratio.log()) / math.log(2)
    losses = ddpm_losses(always(wide), scheduler, x0, t, noise, loss_type="vlb")
    torch.testing.assert_close(losses, bits, rtol=1e-8, atol=1e-9)
    hybrid = ddpm_losses(always(wide), scheduler, x0, t, noise, loss_type="hybrid", vlb_weight=0.5)
    torch.testing.assert_close(hybrid, 0.5 * bits, rtol=1e-8, atol=1e-9)


def test_the_bound_trains_the_variance_and_leaves_the_mean_to_the_simple_loss() -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    x0, t, noise = batch_of((4, 2, 3, 3), scheduler)
    gradients = {}
    for loss_type in ("simple", "hybrid", "vlb"):
        torch.manual_seed(1)
        output = torch.randn(4, 4, 3, 3, dtype=torch.float64).requires_grad_()
        ddpm_losses(always(output), scheduler, x0, t, noise, loss_type=loss_type).sum().backward()
        gradients[loss_type] = output.grad
    mean, variance = slice(None, 2), slice(2, None)
    assert torch.equal(gradients["hybrid"][:, mean], gradients["simple"][:, mean])
    assert not gradients["simple"][:, variance].any()
    torch.testing.assert_close(gradients["hybrid"][:, variance], 0.001 * gradients["vlb"][:, variance], **EXACT)
    assert gradients["hybrid"][:, variance].abs().min() > 0
    assert gradients["vlb"][:, mean].abs().min() > 0


def test_losses_leave_the_scheduler_as_it_is() -> None:
    scheduler = DDPMScheduler(variance_type="fixed_large", thresholding=True)
    config = dict(scheduler.config)
    drawn = batch_of((2, 1, 2, 2), scheduler)
    ddpm_losses(always(torch.zeros_like(drawn[0])), scheduler, *drawn, loss_type="vlb")
    assert dict(scheduler.config) == config


def test_class_labels_reach_the_model() -> None:
    scheduler = DDPMScheduler()
    drawn = batch_of((3, 1, 2, 2), scheduler)
    seen = []

    def unet(xt: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        seen.append(class_labels)
        return SimpleNamespace(sample=xt)

    ddpm_losses(unet, scheduler, *drawn, class_labels=torch.tensor([2, 0, 1]))
    assert seen[0].tolist() == [2, 0, 1]


def test_importance_weights_multiply_each_loss() -> None:
    losses = torch.tensor([1.0, 10.0])
    assert weighted_mean(losses) == 5.5
    assert weighted_mean(losses, torch.tensor([3.0, 0.5])) == 4.0


CHAINS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "prev_sample"])
@pytest.mark.parametrize("chain", ["linear.full", "linear.50", "cosine.full", "cosine.50"])
def test_losses_match_guided_diffusion(data_dir: Path, chain: str, kind: str, variance_type: str) -> None:
    arrays = {name: torch.from_numpy(value) for name, value in np.load(data_dir / "training_losses.npz").items()}
    schedule, respacing = chain.split(".")
    scheduler = DDPMScheduler(beta_schedule=CHAINS[schedule], prediction_type=kind, variance_type=variance_type)
    if respacing != "full":
        scheduler.set_timesteps(respacing=respacing)
    output = arrays[f"in.{chain}.{kind}.{variance_type.partition('_')[0]}" + "_range" * ("range" in variance_type)]
    drawn = arrays["in.x0"], arrays[f"in.{chain}.timestep"], arrays["in.noise"]
    steps = len(scheduler.timesteps)
    with_bound = "hybrid" if variance_type.startswith("learned") else "simple"
    ours = {
        "MSE": {"loss_type": with_bound, "vlb_weight": 1 / steps},
        "RESCALED_MSE": {"loss_type": with_bound},
        "KL": {"loss_type": "vlb"},
        "RESCALED_KL": {"loss_type": "vlb"},
    }
    rounding = rounding_of_the_bound(scheduler, output, *drawn)
    atol = {"MSE": rounding, "RESCALED_MSE": steps / 1000 * rounding, "KL": rounding, "RESCALED_KL": steps * rounding}
    for name, options in ours.items():
        losses = ddpm_losses(always(output), scheduler, *drawn, **options)
        if name == "KL":
            losses = losses / steps
        expected = arrays[f"out.{chain}.{kind}.{variance_type}.{name}"]
        torch.testing.assert_close(
            losses, expected, rtol=1e-5, atol=atol[name], msg=lambda text, name=name: f"{name}: {text}"
        )


def rounding_of_the_bound(
    scheduler: DDPMScheduler, output: Tensor, x0: Tensor, timestep: Tensor, noise: Tensor
) -> float:
    """What kernels that sum in another order may differ by in a term of the bound, in bits per dimension.

    KL = ½ (-1 + log Σ_p - log Σ_q + Σ_q/Σ_p + …) is a small difference of terms as large as the logarithms. Each
    element rounds them to float32; of the mean over an image's D elements, four deviations are 4/√D of one rounding.
    """
    xt = scheduler.q_sample(x0, timestep, noise)
    p, (_, _, log_variance) = scheduler.p_mean_variance(output, timestep, xt), scheduler.q_posterior(x0, xt, timestep)
    logarithms = p.log_variance, log_variance
    size = 1 + sum(float(values.abs().max()) for values in logarithms)
    return 4 / x0[0].numel() ** 0.5 * torch.finfo(torch.float32).eps / 2 * size / math.log(2)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"loss_type": "l2"}, "loss_type.*l2"),
        ({}, {"loss_type": "hybrid"}, "hybrid.*variance_type.*fixed_small"),
        ({}, {"loss_type": "vlb", "snr_gamma": 5.0}, "snr_gamma.*vlb"),
        ({}, {"snr_gamma": 0.0}, "snr_gamma.*positive"),
        ({"prediction_type": "prev_sample"}, {"snr_gamma": 5.0}, "snr_gamma.*prev_sample"),
        ({"variance_type": "learned_range"}, {}, "unet.*2 output channels.*got 1"),
    ],
)
def test_objectives_that_cannot_train_are_refused(config: dict, options: dict, message: str) -> None:
    scheduler = DDPMScheduler(**config)
    drawn = batch_of((1, 1, 2, 2), scheduler)
    with pytest.raises(ValueError, match=message):
        ddpm_losses(always(drawn[0]), scheduler, *drawn, **options)


# --- classification --------------------------------------------------------------------------------------------------


def test_classification_loss_of_a_guess_is_log_k() -> None:
    scheduler = DDPMScheduler()
    x0, t, noise = batch_of((6, 1, 2, 2), scheduler)
    loss = classification_loss(
        lambda xt, t: SimpleNamespace(logits=torch.ones(len(xt), 7, dtype=xt.dtype)), scheduler, x0, t, noise, t % 7
    )
    assert loss.item() == pytest.approx(math.log(7))


def test_a_classifier_of_a_score_network_sees_what_the_network_sees() -> None:
    """x_0 + σ ε, or that over √(1 + σ²)."""
    for scaled in (False, True):
        scheduler, seen = AnnealedLangevinScheduler(5, 0.1, 4.0, scale_input=scaled), []
        x0, t, noise = batch_of((5, 1, 2, 2), scheduler)

        def classifier(xt: Tensor, t: Tensor, seen: list = seen) -> SimpleNamespace:
            seen.append(xt)
            return SimpleNamespace(logits=xt.flatten(1))

        classification_loss(classifier, scheduler, x0, t, noise, t % 4)
        sigma = 0.1 * 40 ** (t / 4.0).double().view(-1, 1, 1, 1)
        expected = x0 + sigma * noise
        torch.testing.assert_close(seen[0], expected / (1 + sigma**2).sqrt() if scaled else expected, rtol=1e-6, atol=0)


class GaussianPair:
    """One pixel, x_0 | y ~ N(m_y, s²), y even odds: everything about x_t is known."""

    means = torch.tensor([-0.8, 0.5], dtype=torch.float64)
    std = 0.3

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.scheduler.alphas_cumprod[t].view(-1, 1)
        return alpha_bar, alpha_bar * self.std**2 + 1 - alpha_bar

    def logits(self, xt: Tensor, t: Tensor) -> Tensor:
        alpha_bar, variance = self.levels(t)
        return -((xt.flatten(1) - alpha_bar.sqrt() * self.means) ** 2) / (2 * variance)

    def eps_by_class(self, xt: Tensor, t: Tensor) -> Tensor:
        """E[ε | x_t, y], (B, 2)."""
        alpha_bar, variance = self.levels(t)
        return (1 - alpha_bar).sqrt() * (xt.flatten(1) - alpha_bar.sqrt() * self.means) / variance

    def eps(self, xt: Tensor, t: Tensor) -> Tensor:
        """E[ε | x_t], (B, 1, 1, 1)."""
        return (self.logits(xt, t).softmax(-1) * self.eps_by_class(xt, t)).sum(-1).view_as(xt)

    def unet(self, xt: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.eps(xt, t))

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x0, t, noise = batch_of((count, 1, 1, 1), self.scheduler)
        labels = torch.arange(count) % 2
        return self.means[labels].view_as(x0) + self.std * x0, t, noise, labels


LEVELS = [
    DDPMScheduler(prediction_type="epsilon"),
    AnnealedLangevinScheduler(12, 0.05, 6.0, prediction_type="epsilon", scale_input=True),
    AnnealedLangevinScheduler.from_config(DDPMScheduler(beta_schedule="squaredcos_cap_v2").config),
]


@pytest.mark.parametrize("scheduler", LEVELS)
def test_guided_denoising_loss_of_the_exact_classifier_is_that_of_the_conditional_denoiser(scheduler) -> None:
    pair = GaussianPair(scheduler)
    x0, t, noise, labels = pair.draw(64)
    loss = guided_denoising_loss(
        lambda xt, t: SimpleNamespace(logits=pair.logits(xt, t)), pair.unet, pair.scheduler, x0, t, noise, labels
    )
    alpha_bar = pair.levels(t)[0].view_as(x0)
    eps = pair.eps_by_class(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, t).gather(1, labels[:, None])
    torch.testing.assert_close(loss.detach(), (eps - noise.flatten(1)).square().mean(), **EXACT)


def test_guided_denoising_loss_is_least_at_the_exact_gradient() -> None:
    pair = GaussianPair(DDPMScheduler())
    drawn = pair.draw(20_000)

    def loss(scale: float) -> float:
        def classifier(xt: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=scale * pair.logits(xt, t))

        return guided_denoising_loss(classifier, pair.unet, pair.scheduler, *drawn).item()

    losses = {scale: loss(scale) for scale in (0.0, 0.5, 0.8, 1.0, 1.25, 2.0)}
    assert min(losses, key=losses.get) == 1.0, losses


@pytest.mark.parametrize("scheduler", LEVELS)
def test_a_gradient_distilled_from_an_exact_teacher_is_the_exact_one_without_noise(scheduler) -> None:
    pair = GaussianPair(scheduler)
    x0, t, noise, labels = pair.draw(64)

    def teacher(xt: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=pair.eps_by_class(xt, t).gather(1, class_labels[:, None]).view_as(xt))

    def loss(scale: float) -> Tensor:
        def classifier(xt: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=scale * pair.logits(xt, t))

        return guided_denoising_loss(classifier, pair.unet, scheduler, x0, t, noise, labels, teacher=teacher)

    torch.testing.assert_close(loss(1.0).detach(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-20)
    assert loss(0.9) > 1e-6


def test_guided_denoising_loss_reads_every_prediction_type() -> None:
    losses = []
    for kind in ("epsilon", "v_prediction"):
        pair = GaussianPair(DDPMScheduler(prediction_type=kind))

        def unet(xt: Tensor, t: Tensor, pair: GaussianPair = pair, kind: str = kind) -> SimpleNamespace:
            eps, alpha_bar = pair.eps(xt, t), pair.levels(t)[0].view_as(xt)
            v = (eps - (1 - alpha_bar).sqrt() * xt) / alpha_bar.sqrt()
            return SimpleNamespace(sample=v if kind == "v_prediction" else eps)

        classifier = lambda xt, t, pair=pair: SimpleNamespace(logits=2 * pair.logits(xt, t))  # noqa: E731
        losses.append(guided_denoising_loss(classifier, unet, pair.scheduler, *pair.draw(64)))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)  # ᾱ near 0 costs digits in the conversion


def test_guided_denoising_loss_reaches_the_classifier_through_attention_and_not_the_unet() -> None:
    torch.manual_seed(0)
    scheduler = DDPMScheduler()
    classifier = NoisyClassifier(
        sample_size=4, in_channels=1, num_classes=3, model_channels=8, channel_mult=(1, 2), attention_downsamples=(1,),
        num_head_channels=8, norm_num_groups=4,
    ).double()  # fmt: skip
    for parameter in classifier.parameters():  # away from the zeros it starts with
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    unet = nn.Conv2d(1, 1, 3, padding=1).double()
    drawn = (*batch_of((5, 1, 4, 4), scheduler), torch.tensor([0, 1, 2, 0, 1]))

    def loss() -> Tensor:
        return guided_denoising_loss(classifier, lambda xt, t: SimpleNamespace(sample=unet(xt)), scheduler, *drawn)

    loss().backward()
    assert unet.weight.grad is None
    direction = [torch.randn_like(parameter) for parameter in classifier.parameters()]
    slope = sum(
        (p.grad * d).sum() for p, d in zip(classifier.parameters(), direction, strict=True) if p.grad is not None
    )
    values = []
    for sign in (1, -1, -1):  # to +h, back to the middle, to -h
        for parameter, d in zip(classifier.parameters(), direction, strict=True):
            parameter.data.add_(sign * 1e-6 * d)
        values.append(loss().item())
    assert slope.item() == pytest.approx((values[0] - values[2]) / 2e-6, rel=1e-4)
