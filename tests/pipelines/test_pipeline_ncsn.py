import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDPMPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from hfdiff import AnnealedLangevinScheduler, DDPMScheduler, NCSNPipeline, NCSNv2Model

CORRELATION = 0.8


class GaussianScore(ModelMixin, ConfigMixin):
    """The exact score of N(0, C) with C = (1, ρ; ρ, 1) on two pixels, noised to C + σ² I."""

    @register_to_config
    def __init__(self, sigmas: tuple[float, ...] = (1.0,), sample_size: tuple = (1, 2), in_channels: int = 1):
        super().__init__()
        self.register_buffer("covariance", torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]]).double())

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        noised = self.covariance + self.config.sigmas[int(timestep)] ** 2 * torch.eye(2)
        return SimpleNamespace(sample=-torch.linalg.solve(noised, sample.flatten(1).T).T.view_as(sample))


def exact_pipeline(**config) -> NCSNPipeline:
    scheduler = AnnealedLangevinScheduler(60, 0.05, 8.0, **{"steps_per_level": 10, **config})
    pipe = NCSNPipeline(GaussianScore(tuple(scheduler.sigmas.tolist())), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def network() -> NCSNPipeline:
    torch.manual_seed(0)
    model = NCSNv2Model(16, 1, 8, num_levels=6, sigma_max=1.0).eval()
    pipe = NCSNPipeline(model, AnnealedLangevinScheduler(6, 0.01, 1.0, steps_per_level=2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_samples_have_the_covariance_of_the_data() -> None:
    samples = exact_pipeline(sampling="consistent")(
        5000, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    covariance = torch.cov(samples.flatten(1).T)
    expected = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("pixel", [0.1, 0.9])
def test_inpainting_draws_the_conditional_distribution(pixel: float) -> None:
    image, mask = torch.tensor([[[[pixel, 0.5]]]]), torch.tensor([[[[0.0, 1.0]]]])
    pipe = exact_pipeline(steps_per_level=40)
    drawn = pipe(3000, None, torch.Generator().manual_seed(0), image, mask, output_type="latent").images.flatten(1)
    known = 2 * pixel - 1
    torch.testing.assert_close(drawn[:, 0], torch.full_like(drawn[:, 0], known))
    # N(ρ x, 1 - ρ²)
    assert drawn[:, 1].mean().item() == pytest.approx(CORRELATION * known, abs=0.06)
    assert drawn[:, 1].var().item() == pytest.approx(1 - CORRELATION**2, rel=0.15)


def test_interpolation_mixes_the_noise_of_its_ends() -> None:
    # A Gaussian's score is linear, so the samples are linear in the noise
    images = exact_pipeline().interpolate(5, generator=torch.Generator().manual_seed(0), output_type="latent")
    first, last = images[0], images[-1]
    for k, image in enumerate(images):
        theta = k / 4 * math.pi / 2
        torch.testing.assert_close(image, math.cos(theta) * first + math.sin(theta) * last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampling", ["langevin", "consistent", "predictor_corrector"])
def test_a_batch_equals_its_images_one_by_one(network: NCSNPipeline, sampling: str) -> None:
    scheduler = AnnealedLangevinScheduler(6, 0.01, 1.0, steps_per_level=2, sampling=sampling)
    pipe = NCSNPipeline(network.unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    batch = pipe(3, generator=generators(1, 2, 3), output_type="pt").images
    for index, seed in enumerate((1, 2, 3)):
        single = pipe(1, generator=generators(seed), output_type="pt").images
        torch.testing.assert_close(batch[index], single[0])


def test_inpainting_keeps_the_known_pixels_of_pictures(network: NCSNPipeline) -> None:
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    mask = Image.fromarray(np.kron([[0, 1]], np.full((16, 8), 255)).astype(np.uint8))
    drawn = network(2, image=picture, mask_image=mask, generator=torch.Generator().manual_seed(0)).images
    for image in drawn:
        assert np.array_equal(np.asarray(image)[:, :8], np.asarray(picture)[:, :8])
        assert not np.array_equal(np.asarray(image)[:, 8:], np.asarray(picture)[:, 8:])


def test_calls_are_counted_and_every_state_can_be_seen(network: NCSNPipeline) -> None:
    states: list[Tensor] = []

    def keep(pipe: NCSNPipeline, index: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tensors["latents"])
        return {}

    final = network(1, 9, torch.Generator().manual_seed(0), callback_on_step_end=keep, output_type="latent").images
    assert len(states) == network.num_timesteps == 9
    assert torch.equal(states[-1], final)


def test_callback_sees_the_posterior_mean_of_what_the_model_sees() -> None:
    pipe, seen = exact_pipeline(), []
    names = ("model_input", "pred_original_sample")
    options = {"callback_on_step_end_tensor_inputs": names, "generator": torch.Generator().manual_seed(0)}
    pipe(5, 30, callback_on_step_end=lambda pipe, i, t, tensors: seen.append((t, tensors)) or {}, **options)
    prior = pipe.unet.covariance
    for t, tensors in seen:
        xt, x0 = (tensors[name].flatten(1) for name in names)
        noised = prior + pipe.scheduler.sigmas[t] ** 2 * torch.eye(2)
        torch.testing.assert_close(x0, xt @ torch.linalg.solve(noised, prior))  # C (C + σ² I)⁻¹ x_t


def test_intermediate_images_are_the_states_that_leave_a_level() -> None:
    pipe, states = exact_pipeline(steps_per_level=2), []

    def keep(pipe: NCSNPipeline, index: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tensors["latents"])
        return {}

    options = {"callback_on_step_end": keep, "output_type": "latent", "return_intermediates": True}
    output = pipe(2, 13, torch.Generator().manual_seed(0), **options)
    assert len(output.intermediates) == 6  # levels of two updates, the last with the denoising call
    for level, image in enumerate(output.intermediates):
        assert torch.equal(image, states[2 * level + 1 + (level == 5)])
    assert torch.equal(output.intermediates[-1], output.images)
    images, intermediates = pipe(1, 13, output_type="pt", return_dict=False, return_intermediates=True)
    assert torch.equal(images, intermediates[-1])
    assert pipe(1, 13, output_type="pt").intermediates is None


def test_a_saved_pipeline_draws_the_same(network: NCSNPipeline, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    loaded = NCSNPipeline.from_pretrained(tmp_path)
    first, second = (
        pipe(2, generator=torch.Generator().manual_seed(4), output_type="np") for pipe in (network, loaded)
    )
    assert np.array_equal(first.images, second.images)


def test_a_ddpm_unet_samples_by_its_levels() -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(8, 1, 1, **blocks, layers_per_block=1, norm_num_groups=4, attention_head_dim=8).eval()
    scheduler = AnnealedLangevinScheduler.from_config(DDPMScheduler().config, steps_per_level=2)
    for pipe in (NCSNPipeline(unet, scheduler), DDPMPipeline(unet, scheduler)):
        pipe.set_progress_bar_config(disable=True)
        images = pipe(2, num_inference_steps=11, generator=torch.Generator().manual_seed(0), output_type="np").images
        assert images.shape == (2, 8, 8, 1)
        assert np.isfinite(images).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"output_type": "jpeg"}, "`output_type`"),
        ({"generator": generators(1)}, "`generator`"),
        ({"image": torch.zeros(1, 1, 16, 16)}, "got no `mask_image`"),
        ({"image": torch.zeros(1, 1, 16, 16), "mask_image": torch.zeros(1, 1, 8, 8)}, "`mask_image` must have"),
        ({"image": torch.zeros(1, 3, 16, 16), "mask_image": torch.zeros(1, 1, 16, 16)}, "`image` must have"),
        (
            {"image": 2 * torch.ones(1, 1, 16, 16), "mask_image": torch.ones(1, 1, 16, 16)},
            r"`image` must be in \[0, 1\]",
        ),
        ({"latents": torch.zeros(2, 1, 8, 8)}, "`latents`"),
        ({"num_inference_steps": 3}, "`num_inference_steps` must be at least 5"),
    ],
)
def test_bad_arguments_are_named(network: NCSNPipeline, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network(**{"batch_size": 2, **arguments})
