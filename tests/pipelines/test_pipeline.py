import diffusers
import numpy as np
import pytest
import torch
from tiny_models import CLASSIFIER, SCHEDULE, make_pipeline
from tiny_training import context, finish

from hfdiff import AnnealedLangevinScheduler, ClassifierGuidedPipeline, DDPMScheduler, NCSNv2Model, NoisyClassifier

SCHEDULERS = [
    diffusers.DDIMScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DDPMScheduler,
    DDPMScheduler,
]


@pytest.fixture(scope="module")
def shared():
    return make_pipeline()


@pytest.fixture
def pipe(shared):
    shared.scheduler = DDPMScheduler(**SCHEDULE)
    shared.calls = {"unet": 0, "classifier": 0}
    handles = [
        getattr(shared, name).register_forward_hook(
            lambda *_, name=name: shared.calls.__setitem__(name, shared.calls[name] + 1)
        )
        for name in shared.calls
    ]
    yield shared
    for handle in handles:
        handle.remove()


def run(pipe, labels=(0, 1, 2), seed=0, **arguments):
    arguments = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(seed), **arguments}
    return pipe(list(labels), output_type="pt", **arguments).images


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scale_zero_is_the_bare_loop_bit_for_bit(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    images = run(pipe, guidance_scale=0.0)
    assert pipe.calls["classifier"] == 0
    generator = torch.Generator().manual_seed(0)
    pipe.scheduler.set_timesteps(5)
    xt = torch.randn(3, 1, 8, 8, generator=generator) * pipe.scheduler.init_noise_sigma
    options = {} if scheduler in (diffusers.UniPCMultistepScheduler,) else {"generator": generator}
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            output = pipe.unet(pipe.scheduler.scale_model_input(xt, t), t).sample
            xt = pipe.scheduler.step(output, t, xt, **options).prev_sample
    assert torch.equal(images, (xt / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_guidance_moves_images_and_restores_the_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    before = dict(pipe.scheduler.config)
    assert (run(pipe, guidance_scale=500.0) - run(pipe, guidance_scale=0.0)).abs().max() > 1e-2
    assert dict(pipe.scheduler.config) == before


def test_interval_and_scale_decide_when_the_classifier_runs(pipe):
    run(pipe, num_inference_steps=10)
    assert pipe.calls == {"unet": 10, "classifier": 10}
    for interval, expected in (((0.0, 0.5), 5), ((0.5, 1.0), 5), ((0.2, 0.8), 6), ((0.0, 1.0), 10)):
        pipe.calls["classifier"] = 0
        run(pipe, num_inference_steps=10, guidance_interval=interval)
        assert pipe.calls["classifier"] == expected, interval
    pipe.calls["classifier"] = 0
    run(pipe, num_inference_steps=10, guidance_scale=lambda progress: 3.0 if progress > 0.8 else 0.0)
    assert pipe.calls["classifier"] == 2
    pipe.calls["classifier"] = 0
    run(pipe, guidance_scale=torch.zeros(3))
    assert pipe.calls["classifier"] == 0


def test_steps_outside_the_interval_are_unguided_bit_for_bit(pipe):
    trail = {}

    def record(name):
        def callback(pipe, i, t, tensors):
            trail.setdefault(name, []).append(tensors["latents"].clone())
            return {}

        return callback

    run(pipe, guidance_scale=0.0, callback_on_step_end=record("off"))
    run(pipe, guidance_scale=9.0, guidance_interval=(0.75, 1.0), callback_on_step_end=record("late"))
    same = [torch.equal(a, b) for a, b in zip(trail["off"], trail["late"])]
    assert same == [True, True, True, False, False]


@pytest.mark.parametrize("scheduler", [s for s in SCHEDULERS if s is not diffusers.UniPCMultistepScheduler])
def test_a_batch_equals_its_images_one_by_one(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    labels, scales = [2, 0, 1], [4.0, 1.0, 7.0]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = run(pipe, labels, generator=generators, guidance_scale=torch.tensor(scales))
    for i in range(3):
        alone = run(pipe, [labels[i]], generator=torch.Generator().manual_seed(i), guidance_scale=scales[i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_ways_to_name_a_class(pipe):
    expected = run(pipe, [2, 0])
    one_hot = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    for labels in (["fox", "cat"], ["fox", 0], torch.tensor([2, 0]), np.array([2, 0]), one_hot):
        images = pipe(
            labels, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        torch.testing.assert_close(images, expected)
    for label in (1, "dog", torch.tensor(1)):
        images = pipe(label, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt").images
        torch.testing.assert_close(images, run(pipe, [1]))


def test_mean_and_score_shift_can_be_forced(pipe):
    auto, mean, score = (run(pipe, guidance_mode=mode) for mode in ("auto", "mean_shift", "score_shift"))
    assert torch.equal(auto, mean)
    assert not torch.equal(auto, score)


def test_score_shift_is_guided_diffusions_ddim(pipe):
    """Its `condition_score` and `ddim_sample`, written out: x_0 is clipped before the shift and not after it."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    images = run(pipe, [0, 2], latents=noise, guidance_scale=20.0)
    alpha_bar = pipe.scheduler.alphas_cumprod
    xt, labels = noise, torch.tensor([0, 2])
    for t, prev in zip([800, 600, 400, 200, 0], [600, 400, 200, 0, None]):
        now, then = alpha_bar[t], torch.tensor(1.0) if prev is None else alpha_bar[prev]
        with torch.no_grad():
            x0 = (now.sqrt() * xt - (1 - now).sqrt() * pipe.unet(xt, t).sample).clamp(-1, 1)
        leaf = xt.clone().requires_grad_()
        log_prob = pipe.classifier(leaf, t).logits.log_softmax(-1)[torch.arange(2), labels].sum()
        gradient = 20 * torch.autograd.grad(log_prob, leaf)[0]
        eps = (xt - now.sqrt() * x0) / (1 - now).sqrt() - (1 - now).sqrt() * gradient
        x0 = (xt - (1 - now).sqrt() * eps) / now.sqrt()
        xt = then.sqrt() * x0 + (1 - then).sqrt() * eps
    torch.testing.assert_close(images, (xt / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_learned_variances_are_read_or_left_out(scheduler):
    pipe = make_pipeline(channels=2)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    for scale in (0.0, 3.0):
        assert run(pipe, guidance_scale=scale).shape == (3, 1, 8, 8)


def test_class_conditional_unets_are_given_the_labels():
    pipe = make_pipeline(num_class_embeds=3)
    assert not torch.equal(run(pipe, [0, 0], guidance_scale=0.0), run(pipe, [0, 1], guidance_scale=0.0))


def test_output_types(pipe):
    tensors = run(pipe)
    arrays = pipe([0, 1, 2], num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    (pictures,) = pipe([0, 1, 2], num_inference_steps=5, generator=torch.Generator().manual_seed(0), return_dict=False)
    for picture, array in zip(pictures, arrays):
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), (array[..., 0] * 255).round().astype("uint8"))


def test_callback_can_replace_the_latents(pipe):
    images = run(
        pipe, callback_on_step_end=lambda pipe, i, t, tensors: {"latents": torch.ones_like(tensors["latents"])}
    )
    assert torch.equal(images, torch.ones_like(images))


def draw_saved(folder):
    pipe = ClassifierGuidedPipeline.from_pretrained(folder)
    images = pipe([0, 1, 2], num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.save(images, folder / "images.pt")


def test_saved_pipeline_gives_the_same_pixels_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = run(pipe, guidance_scale=None)
    process = context.Process(target=draw_saved, args=(tmp_path,))
    process.start()
    assert finish([process]) == [0]
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_work(pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path)
    half = ClassifierGuidedPipeline.from_pretrained(tmp_path, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert half.unet.dtype == half.classifier.dtype == dtype
    images = run(half)
    assert images.dtype == torch.float32
    assert (images - run(pipe)).abs().mean() < 0.05


def test_model_offloading_changes_nothing():
    expected = run(make_pipeline())
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks, without an accelerator to move to
    for _ in range(2):
        assert torch.equal(run(pipe), expected)


def test_optimized_pipeline_draws_the_same_images():
    """Without the compiler, which `make bench` runs: dtype and frozen weights."""
    plain, fast = make_pipeline(), make_pipeline().optimize()
    assert not any(parameter.requires_grad for parameter in fast.classifier.parameters())
    with torch._dynamo.config.patch(disable=True):
        assert (run(plain) - run(fast)).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"class_labels": 3}, "class_labels"),
        ({"class_labels": -1}, "class_labels"),
        ({"class_labels": [0, 17]}, "class_labels"),
        ({"class_labels": "wolf"}, "class_labels"),
        ({"class_labels": 1.5}, "class_labels"),
        ({"class_labels": True}, "class_labels"),
        ({"class_labels": []}, "class_labels"),
        ({"class_labels": torch.rand(2, 4)}, "class_labels"),
        ({"class_labels": torch.tensor([[0.5, 0.6, 0.2]])}, "class_labels"),
        ({"class_labels": torch.tensor([[1.5, -0.5, 0.0]])}, "class_labels"),
        ({"class_labels": torch.tensor([[torch.nan, 0.5, 0.5]])}, "class_labels"),
        ({"generator": [torch.Generator()]}, "generator"),
        ({"generator": 3}, "generator"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": "big"}, "guidance_scale"),
        ({"guidance_scale": torch.tensor([1.0, torch.nan])}, "guidance_scale"),
        ({"guidance_scale": torch.tensor([1.0, -2.0])}, "guidance_scale"),
        ({"guidance_scale": torch.ones(3)}, "guidance_scale"),
        ({"guidance_scale": torch.ones(2, 1)}, "guidance_scale"),
        ({"guidance_scale": lambda progress: float("nan")}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": -5}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval"),
        ({"guidance_interval": (-0.1, 1.0)}, "guidance_interval"),
        ({"guidance_interval": (0.0, 1.1)}, "guidance_interval"),
        ({"guidance_interval": 0.5}, "guidance_interval"),
        ({"guidance_interval": (0.0, float("nan"))}, "guidance_interval"),
        ({"latents": torch.zeros(2, 1, 8, 9)}, "latents"),
        ({"latents": torch.zeros(3, 1, 8, 8)}, "latents"),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, "latents"),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.float64)}, "latents"),
        ({"latents": np.zeros((2, 1, 8, 8))}, "latents"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"guidance_mode": "both"}, "guidance_mode"),
        ({"callback_on_step_end_tensor_inputs": ["image"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_arguments_are_named_before_any_model_runs(pipe, arguments, name):
    with pytest.raises(ValueError, match=rf"`{name}`.*(got|gets)"):
        pipe(**{"class_labels": [0, 1], "num_inference_steps": 2, **arguments})
    assert pipe.calls == {"unet": 0, "classifier": 0}


def test_modes_a_scheduler_cannot_follow_are_refused(pipe):
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="guidance_mode"):
        run(pipe, guidance_mode="mean_shift")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="scheduler"):
        run(pipe)
    pipe.scheduler = AnnealedLangevinScheduler.from_config(DDPMScheduler(**SCHEDULE).config)
    with pytest.raises(ValueError, match="guidance_mode"):
        run(pipe, guidance_mode="mean_shift", num_inference_steps=11)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sample_size": 16}, "sample_size"),
        ({"in_channels": 3}, "in_channels"),
        ({"noise_schedule": {"num_train_timesteps": 1000, "beta_schedule": "linear"}}, "noise levels"),
        ({"noise_schedule": {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2"}}, "noise levels"),
    ],
)
def test_a_classifier_of_other_images_or_noise_is_refused(pipe, change, match):
    other = NoisyClassifier(**{**CLASSIFIER, **change})
    with pytest.raises(ValueError, match=match):
        ClassifierGuidedPipeline(pipe.unet, other, pipe.scheduler)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"scale_input": False}, False),  # the classifier was given what this model is not
        ({"sigma_max": 5.0}, False),
        ({"num_train_timesteps": 1000}, False),
        ({"num_train_timesteps": 10, "beta_schedule": "linear", "sigma_schedule": None, "sigma_max": None}, False),
    ],
)
def test_a_classifier_of_a_score_networks_levels_goes_with_these_alone(pipe, change, fits):
    levels = {"num_train_timesteps": 10, "sigma_min": 0.1, "sigma_max": 8.0, "sigma_schedule": "geometric"}
    scheduler = AnnealedLangevinScheduler(**levels, scale_input=True, prediction_type="v_prediction")
    schedule = {name: value for name, value in {**levels, "scale_input": True, **change}.items() if value is not None}
    classifier = NoisyClassifier(**{**CLASSIFIER, "noise_schedule": schedule}).eval()
    if not fits:
        with pytest.raises(ValueError, match="noise levels"):
            ClassifierGuidedPipeline(pipe.unet, classifier, scheduler)
        return
    guided = ClassifierGuidedPipeline(pipe.unet, classifier, scheduler)
    guided.set_progress_bar_config(disable=True)
    assert run(guided, num_inference_steps=31).isfinite().all()  # more than there are levels
    with pytest.raises(ValueError, match="noise levels"):
        ClassifierGuidedPipeline(pipe.unet, classifier, DDPMScheduler(**SCHEDULE))


def test_data_from_zero_are_drawn_as_they_are(pipe):
    model = NCSNv2Model(8, 1, 8, num_levels=3, sigma_min=0.1, sigma_max=1.0, rescaled=False).eval()
    scheduler = AnnealedLangevinScheduler(3, 0.1, 1.0, steps_per_level=1)
    guided = ClassifierGuidedPipeline(model, NoisyClassifier(**{**CLASSIFIER, "noise_schedule": None}), scheduler)
    guided.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images, samples = (
        guided([0, 1], 0.0, 4, torch.Generator().manual_seed(1), latents=noise, output_type=kind).images
        for kind in ("pt", "latent")
    )
    torch.testing.assert_close(images, samples.clamp(0, 1))


def test_a_scheduler_of_other_noise_is_refused(pipe):
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="noise levels"):
        run(pipe)
    assert pipe.calls["unet"] == 0
