"""Uses of the pipelines that a first week brings up: other components, other ways to call, what cannot be."""

import warnings

import diffusers
import numpy as np
import pytest
import torch
from tiny_models import SCHEDULE, make_pipeline
from torch import nn

from hfdiff import AnnealedLangevinScheduler, ClassifierGuidedPipeline, DDPMScheduler, NCSNPipeline, NCSNv2Model


class Brightness(nn.Module):
    """log p(y | x_t) of three classes by the mean of the image, in plain torch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([-4.0, 0.0, 4.0]))

    def forward(self, sample, timestep):
        return sample.mean(dim=(1, 2, 3))[:, None] * self.scale


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def conditional():
    """A class-conditional UNet without a classifier."""
    unet = make_pipeline(num_class_embeds=3).unet
    names = {0: "cat", 1: "dog", 2: "fox"}
    made = ClassifierGuidedPipeline(unet, None, DDPMScheduler(**SCHEDULE), id2label=names)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def ncsn():
    torch.manual_seed(0)
    scheduler = AnnealedLangevinScheduler(6, 0.01, 1.0, steps_per_level=1)
    made = NCSNPipeline(NCSNv2Model(8, 1, 8, num_levels=6, sigma_max=1.0), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


class VAEOnly(diffusers.DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


def draw(pipe, *labels, seed=0, **options):
    options = {"num_inference_steps": 3, "output_type": "pt", **options}
    arguments = (list(labels),) if labels else ()
    return pipe(*arguments, generator=torch.Generator().manual_seed(seed), **options).images


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- components ------------------------------------------------------------------------------------------------------


def test_a_class_conditional_unet_draws_by_class_without_a_classifier(conditional, tmp_path):
    assert conditional.num_classes == 3
    first, second = draw(conditional, "cat"), draw(conditional, 2)
    assert not torch.equal(first, second)
    with torch.no_grad():
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        conditional.scheduler.set_timesteps(1)
        t = conditional.scheduler.timesteps[0]
        output = conditional.unet(noise, t, class_labels=torch.tensor([2])).sample
        expected = conditional.scheduler.step(output, t, noise).prev_sample
    torch.testing.assert_close(draw(conditional, "fox", num_inference_steps=1, output_type="latent"), expected)
    conditional.save_pretrained(tmp_path / "conditional")
    opened = quiet(ClassifierGuidedPipeline.from_pretrained(tmp_path / "conditional"))
    assert opened.classifier is None
    assert opened.id2label == {0: "cat", 1: "dog", 2: "fox"}
    torch.testing.assert_close(draw(opened, "fox"), second)


def test_what_a_class_conditional_unet_cannot_do_is_refused_before_it_runs(conditional):
    calls = []
    handle = conditional.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for labels, options, message in [
        ((torch.full((1, 3), 1 / 3),), {}, "embeddings do not mix, got "),
        ((), {}, "`class_labels` must be given, got None: the UNet is class-conditional"),
        (([3],), {}, "`class_labels` must be between 0 and 3 - 1"),
        (([1],), {"guidance_scale": 2.0}, "`guidance_scale` needs a classifier"),
    ]:
        with pytest.raises(ValueError, match=message):
            conditional(*labels, **options)
    handle.remove()
    assert not calls
    with pytest.raises(ValueError, match="`classifier` must know the UNet's 5 classes, got 3"):
        make_pipeline(num_class_embeds=5)
    with pytest.raises(ValueError, match="`unet` must have an embedding of each class, got 3 for 4"):
        ClassifierGuidedPipeline(conditional.unet, None, conditional.scheduler, id2label=dict(enumerate("abcd")))
    assert make_pipeline(num_class_embeds=4).num_classes == 3  # the fourth stands for no class


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_module_guides(pipe, dtype):
    guided = quiet(ClassifierGuidedPipeline(pipe.unet, Brightness(), pipe.scheduler, default_guidance_scale=100.0))
    guided = guided.to("cpu", dtype)
    dark, bright = draw(guided, 0), draw(guided, 2)
    assert dark.mean() < bright.mean() - 0.1
    assert next(guided.classifier.parameters()).dtype == dtype
    pipe.to(torch.float32)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(pipe, tmp_path):
    guided = ClassifierGuidedPipeline(pipe.unet, Brightness(), pipe.scheduler)
    with pytest.raises(
        ValueError, match=r"`classifier` cannot be saved, got Brightness; make it a diffusers\.ModelMixin"
    ):
        guided.save_pretrained(tmp_path / "guided")
    adapted = make_pipeline()
    adapted.unet._hf_peft_config_loaded = True  # as `unet.add_adapter` leaves it
    with pytest.raises(ValueError, match="`unet` cannot be saved, got UNet2DModel with adapters that are not merged"):
        adapted.save_pretrained(tmp_path / "adapted")
    wrapper = type("PeftModel", (nn.Module,), {"__module__": "peft.peft_model"})()
    with pytest.raises(ValueError, match="`unet` cannot be saved, got PeftModel"):
        NCSNPipeline(wrapper, AnnealedLangevinScheduler()).save_pretrained(tmp_path / "wrapped")
    assert not list(tmp_path.iterdir())


def test_a_classifier_of_clean_images_is_refused_at_construction(pipe):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    with pytest.raises(ValueError, match=r"`classifier` must map noisy images and a timestep.*NoisyClassifier"):
        ClassifierGuidedPipeline(pipe.unet, ViTForImageClassification(config), pipe.scheduler)


def test_pipelines_are_made_of_others(pipe, ncsn):
    again = ClassifierGuidedPipeline.from_pipe(pipe)
    assert again.components == pipe.components
    assert again.default_guidance_scale == pipe.default_guidance_scale == 2
    torch.testing.assert_close(draw(quiet(again), 1), draw(pipe, 1), rtol=0, atol=0)
    plain = diffusers.DDPMPipeline(pipe.unet, pipe.scheduler)
    guided = ClassifierGuidedPipeline.from_pipe(plain, classifier=pipe.classifier)
    assert guided.default_guidance_scale == 2
    assert ClassifierGuidedPipeline.from_pipe(plain).classifier is None
    assert NCSNPipeline.from_pipe(ncsn).components == ncsn.components
    with pytest.raises(ValueError, match=r"must sample by annealed Langevin dynamics, got DDPMScheduler.*from_config"):
        NCSNPipeline.from_pipe(pipe)
    langevin = AnnealedLangevinScheduler.from_config(pipe.scheduler.config)
    assert NCSNPipeline.from_pipe(pipe, scheduler=langevin).unet is pipe.unet
    with pytest.raises(ValueError, match="must have unet, got a VAEOnly; give `unet=`"):
        ClassifierGuidedPipeline.from_pipe(VAEOnly(pipe.scheduler))


def test_the_scale_follows_the_classifiers_weights(pipe, tmp_path):
    assert ClassifierGuidedPipeline(**pipe.components).default_guidance_scale == 2
    pipe.save_pretrained(tmp_path)
    opened = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    assert opened.classifier.config.guidance_scale == 2
    assert ClassifierGuidedPipeline(opened.unet, opened.classifier, opened.scheduler).default_guidance_scale == 2
    assert ClassifierGuidedPipeline(pipe.unet, Brightness(), pipe.scheduler).default_guidance_scale == 1
    other = ClassifierGuidedPipeline(opened.unet, opened.classifier, opened.scheduler, default_guidance_scale=5)
    assert other.default_guidance_scale == 5
    assert opened.default_guidance_scale == 2


# --- calls -----------------------------------------------------------------------------------------------------------


def test_without_labels_images_are_unguided(pipe):
    expected = draw(pipe, 0, 1, guidance_scale=0)
    for options in ({}, {"guidance_scale": 0}, {"guidance_scale": 0.0}):
        torch.testing.assert_close(draw(pipe, batch_size=2, **options), expected, rtol=0, atol=0)
    for arguments, message in [
        (
            {"guidance_scale": 3.0},
            "`class_labels` must be given to be guided to, got None with a `guidance_scale` of 3",
        ),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"class_labels": [0, 1], "batch_size": 3}, "`batch_size` must be left out where there are class labels"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)


def test_a_pipeline_opened_without_its_classifier_says_so_before_a_step(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    opened = quiet(ClassifierGuidedPipeline.from_pretrained(tmp_path, classifier=None))
    with pytest.raises(ValueError, match=r"`class_labels` needs a classifier.*open the pipeline with `classifier=`"):
        opened([1])
    torch.testing.assert_close(draw(opened, batch_size=2), draw(pipe, 0, 1, guidance_scale=0), rtol=0, atol=0)


def test_eta_timesteps_and_respacing_reach_the_scheduler(pipe):
    own = pipe.scheduler
    chain = draw(pipe, 1, respacing="ddim25", num_inference_steps=50)
    own.set_timesteps(respacing="ddim25")
    by_hand = draw(pipe, 1, timesteps=own.timesteps.tolist())
    torch.testing.assert_close(chain, by_hand, rtol=0, atol=0)
    assert pipe.num_timesteps == 25
    pipe.scheduler = diffusers.DDIMScheduler.from_config(own.config)
    assert not torch.equal(draw(pipe, 1, eta=1.0), draw(pipe, 1))
    for options, message in [
        ({"eta": 1.5}, "`eta` must be a number from 0"),
        ({"respacing": "ddim25"}, "`respacing` must be left out for a DDIMScheduler"),
        ({"timesteps": [1, 0], "respacing": "2"}, "`timesteps` and `respacing` exclude each other"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(pipe, 1, **options)
    pipe.scheduler = own
    with pytest.raises(ValueError, match="`eta` must be left out for a DDPMScheduler"):
        draw(pipe, 1, eta=0.5)
    with pytest.raises(ValueError, match="`timesteps` must give descending timesteps"):
        draw(pipe, 1, timesteps=[0, 10])


@pytest.mark.parametrize("labels", [[1], "dog", torch.tensor([1]), torch.full((1, 3), 1 / 3)])
@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "Langevin"])
def test_inference_mode_changes_nothing(pipe, kind, labels):
    own = pipe.scheduler
    kinds = {"DDPM": DDPMScheduler, "Langevin": AnnealedLangevinScheduler}
    pipe.scheduler = kinds.get(kind) or getattr(diffusers, f"{kind}Scheduler")
    pipe.scheduler = pipe.scheduler.from_config(own.config)
    options = {"num_inference_steps": 12, "output_type": "pt"}
    expected = pipe(labels, generator=torch.Generator().manual_seed(0), **options).images
    with torch.inference_mode():
        found = pipe(labels, generator=torch.Generator().manual_seed(0), **options).images
    pipe.scheduler = own
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_inference_mode_of_a_score_network(ncsn):
    expected = draw(ncsn, batch_size=2, num_inference_steps=6)
    with torch.inference_mode():
        torch.testing.assert_close(draw(ncsn, batch_size=2, num_inference_steps=6), expected, rtol=0, atol=0)
        ncsn.interpolate(3, 6)


@pytest.mark.parametrize("kind", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver", "EulerDiscrete"])
def test_timesteps_that_repeat_are_steps_of_their_own(pipe, kind, caplog, monkeypatch):
    """Karras's spacing of a cosine schedule gives some timesteps twice."""
    own = pipe.scheduler
    monkeypatch.setattr(diffusers.utils.logging.get_logger("hfdiff").parent, "propagate", True, raising=False)
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(own.config, use_karras_sigmas=True)
    steps = []
    pipe([1], num_inference_steps=25, callback_on_step_end=lambda p, i, t, x: steps.append(float(t)) or {})
    pipe.scheduler = own
    assert len(steps) == 25
    repeats = len(set(steps)) < 25
    told = [record for record in caplog.records if "different timesteps" in record.getMessage()]
    assert len(told) == repeats
    assert repeats or kind == "EulerDiscrete"


def stop_at(last):
    def callback(pipe, index, timestep, tensors):
        pipe._interrupt = index == last
        return {}

    return callback


def test_a_callback_ends_the_sampling(pipe, ncsn):
    seen = []
    for made, options in ((pipe, {"class_labels": [1]}), (ncsn, {})):
        handle = made.unet.register_forward_pre_hook(lambda *_: seen.append(1))
        for _ in range(2):  # the second call starts anew
            seen.clear()
            made(**options, num_inference_steps=6, callback_on_step_end=stop_at(1))
            assert len(seen) == 2
            assert made.interrupt
        handle.remove()


# --- what is not finite, or does not fit -----------------------------------------------------------------------------


def test_a_callback_that_returns_nothing_is_told_its_step(pipe, ncsn):
    for drawn, labels in ((pipe, {"class_labels": [1]}), (ncsn, {})):
        for given, words in (
            (lambda *_: None, r"return a dictionary, got None at step 0 \(timestep"),
            (lambda *_: {"latents": torch.zeros(1)}, r"return `latents` of shape .* got \(1,\) at step 0"),
            (3, "be a function of"),
        ):
            with pytest.raises(ValueError, match=f"^`callback_on_step_end` must {words}"):
                drawn(**labels, num_inference_steps=11, callback_on_step_end=given)
        with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` must be a list of names, got 'lat"):
            drawn(**labels, callback_on_step_end_tensor_inputs="latents")


def test_an_unguided_pipeline_refuses_a_mode_and_a_scheduler_of_no_diffusion(pipe):
    bare = quiet(ClassifierGuidedPipeline(pipe.unet, None, pipe.scheduler))
    with pytest.raises(ValueError, match="`guidance_mode` must be one of"):
        bare(guidance_mode="both")
    bare.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"`scheduler` must be of diffusion models, .* got FlowMatchEulerDiscrete"):
        bare()


def test_weights_stored_in_fewer_bits_draw_in_what_they_compute_in():
    pipe = make_pipeline()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.dtype == torch.float32
    assert pipe(1, num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_samples_that_are_not_finite_are_refused(ncsn):
    guided = make_pipeline()
    for made, options in ((guided, {"class_labels": [1]}), (ncsn, {})):
        with torch.no_grad():
            next(made.unet.parameters()).fill_(torch.nan)
        for output_type in ("pil", "latent"):
            with pytest.raises(ValueError, match="The samples are not finite"):
                made(**options, num_inference_steps=6, output_type=output_type)


def test_latents_that_are_not_finite_are_refused(pipe, ncsn):
    for made, options in ((pipe, {"class_labels": [1]}), (ncsn, {})):
        latents = torch.zeros(1, 1, 8, 8)
        latents[0, 0, 3, 4] = torch.nan
        with pytest.raises(ValueError, match="`latents` must be finite"):
            made(**options, latents=latents)


def test_known_pixels_of_another_count_or_rank_are_refused(ncsn):
    image, mask = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    for pictures, message in [
        ({"image": image.expand(3, -1, -1, -1), "mask_image": mask}, "`image` must be one for all or one for each of"),
        ({"image": image, "mask_image": mask.expand(3, -1, -1, -1)}, "`mask_image` must be one for all.* got 3"),
        ({"image": image, "mask_image": mask[0, 0]}, r"`mask_image` must have 4 axes \(B, C, H, W\), got 2"),
        ({"image": np.zeros((8, 8, 1)), "mask_image": mask}, r"`image` must have 4 axes \(B, H, W, C\), got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            ncsn(2, **pictures)


def test_an_interpolation_takes_a_generator_for_each_end(ncsn):
    def ends(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return ncsn.interpolate(2, 6, generators, output_type="pt")

    torch.testing.assert_close(ends(1, 2)[0], ends(1, 3)[0])
    assert not torch.equal(ends(1, 2)[1], ends(1, 3)[1])
    torch.testing.assert_close(ends(1, 2)[1], ends(2, 1)[0], rtol=0, atol=1e-6)  # cos π/2 is not quite 0
    with pytest.raises(ValueError, match="`generator` must be one, or a list of two, one for each end, got 3"):
        ends(1, 2, 3)


@pytest.mark.parametrize(
    ("betas", "name"),
    [
        ({"beta_end": 1.5}, "`beta_start` and `beta_end`"),
        ({"beta_start": -0.1}, "`beta_start` and `beta_end`"),
        ({"trained_betas": [0.1, 1.2, 0.3]}, "`trained_betas`"),
        ({"trained_betas": [0.1, 1.0, 0.3]}, "`trained_betas`"),
        ({"trained_betas": [0.1, float("nan")]}, "`trained_betas`"),
        ({"trained_betas": []}, "`trained_betas`"),
    ],
)
def test_betas_outside_0_to_1_are_refused(betas, name):
    for scheduler in (DDPMScheduler, lambda **given: AnnealedLangevinScheduler(sigma_schedule="from_betas", **given)):
        with pytest.raises(ValueError, match=f"{name} must give betas between 0 and 1"):
            scheduler(num_train_timesteps=3, **betas)
    DDPMScheduler(3, trained_betas=[0.1, 0.2, 1.0])  # a terminal SNR of zero


def test_no_line_that_nobody_can_act_on(pipe, caplog, capfd):
    diffusers.utils.logging.set_verbosity_warning()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in ("DDIM", "EulerDiscrete", "UniPCMultistep", "DPMSolverMultistep", "PNDM", "DEISMultistep"):
            other = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
            DDPMScheduler.from_config(other.config)
            AnnealedLangevinScheduler.from_config(other.config)
        pipe.to("cpu")
        draw(pipe, 1)
    written = capfd.readouterr()
    assert "not expected" not in written.out + written.err + caplog.text
    assert not [warning for warning in told if "hfdiff" in str(warning.filename)]


def test_optimizing_for_half_precision_tells_nothing(monkeypatch, capfd):
    """As on a processor with bfloat16, without the compiler."""
    monkeypatch.setattr("hfdiff.pipelines.optimization.fastest_dtype", lambda device: torch.bfloat16)
    optimized = make_pipeline().optimize()
    assert optimized.unet.dtype == optimized.classifier.dtype == torch.bfloat16
    with torch._dynamo.config.patch(disable=True):
        draw(optimized, 1)
    assert "float32" not in capfd.readouterr().err
