"""Nats a gradient carries: against mutual information by quadrature, of two classes that overlap."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hfdiff.evaluation import guidance_information, plot_guidance_information
from hfdiff.evaluation.guidance_information import label_entropy, spread_levels
from hfdiff.schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler

PRIOR = torch.tensor([0.3, 0.7], dtype=torch.float64)
SCHEDULERS = [
    DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction"),
    AnnealedLangevinScheduler.from_config(DDPMScheduler(beta_schedule="squaredcos_cap_v2").config),
]


class Pair:
    """Two classes of one pixel, N(m_y, 0.4²), whose exact denoisers and posterior are those of Gaussians."""

    means, std = torch.tensor([-0.5, 0.6], dtype=torch.float64), 0.4

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler
        self.config = {"num_class_embeds": 3}

    def logits(self, xt: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.scheduler.alphas_cumprod.double()[t].view(-1, 1)
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        return PRIOR.log() - (xt.flatten(1) - alpha_bar.sqrt() * self.means) ** 2 / (2 * variance)

    def noise(self, xt: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        alpha_bar = self.scheduler.alphas_cumprod.double()[t].view(-1, 1)
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        by_class = (1 - alpha_bar).sqrt() * (xt.flatten(1) - alpha_bar.sqrt() * self.means) / variance
        mean = (self.logits(xt, t).softmax(-1) * by_class).sum(-1, keepdim=True)
        if class_labels is not None:
            mean = torch.cat([by_class, mean], dim=1).gather(1, class_labels[:, None])
        return mean.view_as(xt)

    def __call__(self, xt: Tensor, t: Tensor, **condition: Tensor) -> SimpleNamespace:
        eps = self.noise(xt, t, **condition)
        if self.scheduler.config["prediction_type"] == "v_prediction":
            alpha_bar = self.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
            return SimpleNamespace(sample=(eps - (1 - alpha_bar).sqrt() * xt) / alpha_bar.sqrt())
        return SimpleNamespace(sample=eps)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Quantiles instead of draws, so that only the noise is random."""
        labels = (torch.arange(count) >= count * PRIOR[0]).long()
        uniform = (torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1e-9).clamp(
            max=1 - 1e-9
        )
        x0 = self.means[labels] + self.std * torch.special.ndtri(uniform)
        return x0.view(-1, 1, 1, 1), labels


def mutual_information(means: Tensor, std: float) -> float:
    """I(x; y) of the two Gaussians, by quadrature."""
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    joint = PRIOR * torch.exp(-((grid[:, None] - means) ** 2) / (2 * std**2)) / (std * (2 * torch.pi) ** 0.5)
    marginal = joint.sum(dim=1, keepdim=True)
    terms = torch.special.xlogy(joint, joint / (marginal * PRIOR).clamp(min=1e-300))
    return float(torch.trapezoid(terms.sum(dim=1), grid))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_exact_gradient_carries_the_mutual_information_and_half_of_it_three_quarters(scheduler) -> None:
    pair, truth = Pair(scheduler), mutual_information(Pair.means, Pair.std)
    assert 0.3 < truth < 0.5  # of H(y) = 0.61: the classes overlap
    x0, labels = pair.draw(40_000)

    def measure(**options: float):
        generator = torch.Generator().manual_seed(0)
        return guidance_information(
            pair, pair.logits, scheduler, x0, labels, generator, batch_size=40_000, num_levels=40, **options
        )

    whole = measure()
    assert whole.carried == pytest.approx(truth, rel=0.015)
    assert whole.known == pytest.approx(truth, rel=0.015)
    assert whole.entropy == pytest.approx(label_entropy(labels))
    assert (whole.carried_up_to - whole.known_up_to).abs().max() < 0.015  # at every level
    decisive = (whole.log_snr > -2) & (whole.log_snr < 2)
    torch.testing.assert_close(
        whole.best_scales[decisive], torch.ones(decisive.sum().item()).double(), atol=0.1, rtol=0
    )
    assert measure(guidance_scale=0.5).carried == pytest.approx(0.75 * truth, rel=0.015)
    assert measure(guidance_scale=0.0).carried == 0


def test_the_difference_of_a_conditional_and_an_unconditional_denoiser_carries_it_too() -> None:
    pair = Pair(SCHEDULERS[0])
    x0, labels = pair.draw(10_000)
    options = {"batch_size": 10_000, "num_levels": 30}
    found = [
        guidance_information(pair, guide, pair.scheduler, x0, labels, torch.Generator().manual_seed(0), **options)
        for guide in (pair.logits, None)
    ]
    torch.testing.assert_close(found[0].carried_up_to, found[1].carried_up_to)
    assert found[1].known_up_to.isnan().all()


def test_class_probabilities_are_labels_too() -> None:
    pair = Pair(SCHEDULERS[0])
    x0, labels = pair.draw(500)
    soft = torch.nn.functional.one_hot(labels, 2).double()
    by_index, by_probability = (
        guidance_information(pair, pair.logits, pair.scheduler, x0, y, torch.Generator().manual_seed(0), num_levels=9)
        for y in (labels, soft)
    )
    assert by_probability.carried == pytest.approx(by_index.carried)
    assert by_probability.entropy == pytest.approx(by_index.entropy)
    assert str(by_index).startswith("the gradient carries ")


def test_levels_are_spread_evenly_in_log_snr_from_noise_to_image() -> None:
    scheduler = SCHEDULERS[0]
    alpha_bar = scheduler.alphas_cumprod.double()
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    levels = spread_levels(log_snr, 20)
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()
    middle = log_snr[levels][3:-4].diff()
    assert (middle - middle.mean()).abs().max() < 0.1


def test_the_plot_is_a_picture_and_what_does_not_fit_is_refused(tmp_path) -> None:
    pair = Pair(SCHEDULERS[0])
    x0, labels = pair.draw(20)
    plot_guidance_information(
        guidance_information(pair, pair.logits, pair.scheduler, x0, labels, num_levels=5), tmp_path / "nats.png"
    )
    assert (tmp_path / "nats.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="`labels` must be one per image, got 3 for 20"):
        guidance_information(pair, pair.logits, pair.scheduler, x0, labels[:3])
    unscaled = AnnealedLangevinScheduler(10, 0.05, 6.0, prediction_type="epsilon")
    with pytest.raises(ValueError, match="`scheduler` must give"):
        guidance_information(pair, pair.logits, unscaled, x0, labels)
