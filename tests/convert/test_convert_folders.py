"""Folders of converted checkpoints: complete or not there, and sampling as the originals' code does.

adm_trajectories.npz holds runs of guided-diffusion's `p_sample_loop` and `ddim_sample_loop` (22e0df8) with the
`cond_fn` of classifier_sample.py, by the networks unet.adm and classifier.attention of adm_networks.npz: the noise of
the start and of each step, every state, and what each step was given. CPU, float32, torch 2.13.0.
"""

import functools
import json
import os
import pickle

import diffusers
import numpy as np
import pytest
import torch
import yaml
from adm_networks import ARRAYS, as_text, assert_near, classifier_flags, frozen_weights, network

from hfdiff import ADMUNet, ClassifierGuidedPipeline, DDIMScheduler, DDPMScheduler, NCSNPipeline, NoisyClassifier
from hfdiff.cli import main
from hfdiff.convert.flags import parse_flags
from hfdiff.convert.folder import convert_guided_diffusion
from hfdiff.convert.guided_diffusion import load_classifier, load_unet
from hfdiff.convert.imagenet import IMAGENET_CLASSES
from hfdiff.convert.ncsn import load_model
from hfdiff.convert.schedule import ddpm_config
from hfdiff.pipelines.hub_download import _choose_weights

TEXTS = {
    "unet": as_text(network("unet.adm")[0]),
    "classifier": "--classifier_scale 4 " + as_text(classifier_flags(network("classifier.attention")[0])),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("unet.adm", "unet.plain", "unet.heads_over_widths", "classifier.attention"):
        torch.save(network(name)[1], folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def guided(checkpoints, tmp_path_factory):
    """A guided pipeline's folder, and what the command printed."""
    output = tmp_path_factory.mktemp("folders") / "guided"
    arguments = ["convert", "guided-diffusion", "--unet", checkpoints / "unet.adm.pt", "--output", output, "--verify"]
    arguments += ["--classifier", checkpoints / "classifier.attention.pt", "--class_names", *"abcdefghij"]
    flags = f"{TEXTS['classifier']} {TEXTS['unet']} --timestep_respacing 10 --noise_schedule cosine"
    assert main([str(argument) for argument in arguments] + ["--flags", flags]) == 0
    return output


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


# --- trajectories ----------------------------------------------------------------------------------------------------


def trajectory(data_dir, name):
    arrays = np.load(data_dir / "adm_trajectories.npz")
    keys = [key for key in arrays if key.startswith(f"{name}.") and not key.endswith(".case")]
    tensors = {key.removeprefix(f"{name}."): torch.from_numpy(arrays[key]) for key in keys}
    return json.loads(str(arrays[f"{name}.case"])), tensors


def make_pipeline(case):
    """The pipeline of a case's networks, with the scheduler of its flags."""
    chain = {
        "noise_schedule": case.get("schedule", "linear"),
        "diffusion_steps": case.get("steps", 1000),
        "rescale_timesteps": case.get("rescale", False),
        "timestep_respacing": case["respacing"],
        "learn_sigma": case.get("learn_sigma", True),
    }
    flags, _ = network("unet.adm")
    encoder, classifier = network("classifier.attention")
    shapes = json.loads(str(ARRAYS["unet.adm.shapes"]))
    if not chain["learn_sigma"]:
        shapes |= {name: [3, *shapes[name][1:]] for name in ("out.2.weight", "out.2.bias")}
    config = ddpm_config({**parse_flags(""), **chain})
    pipe = ClassifierGuidedPipeline(
        load_unet(frozen_weights(shapes), {**flags, **chain}),
        load_classifier(classifier, {**encoder, **chain}),
        (DDIMScheduler if case["ddim"] else DDPMScheduler)(**config),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def give_noise(scheduler, noise):
    """Lets a DDPM scheduler's `step` take recorded noise."""
    step, rest = scheduler.step, iter(noise)

    @functools.wraps(step)
    def noisy(*args, generator=None, **options):
        return step(*args, variance_noise=next(rest), **options)

    scheduler.step = noisy


TRAJECTORIES = ["ddpm", "ddpm_sections", "ddpm_fixed_rescaled", "ddim", "ddim_cosine", "ddim_spread"]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_guided_trajectories_are_the_originals(data_dir, name):
    case, run = trajectory(data_dir, name)
    pipe = make_pipeline(case)
    if not case["ddim"]:
        give_noise(pipe.scheduler, run["noise"])
    seen = []

    def keep(pipe, index, timestep, tensors):
        seen.append((int(timestep), tensors["latents"]))
        return {}

    pipe(run["y"], case["scale"], len(run["xs"]), latents=run["x"], output_type="latent", callback_on_step_end=keep)
    assert [timestep for timestep, _ in seen] == run["timestep_map"].tolist()[::-1]
    for (_, latents), expected in zip(seen, run["xs"]):
        assert_near(latents, expected, 1e-4)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_guided_steps_are_the_originals(data_dir, name):
    """Each from the state, the model output, the gradient and the noise that the original had."""
    case, run = trajectory(data_dir, name)
    scheduler = make_pipeline(case).scheduler
    scheduler.set_timesteps(respacing=case["respacing"])
    xt = run["x"]
    for index, t in enumerate(scheduler.timesteps):
        noise = {} if case["ddim"] else {"variance_noise": run["noise"][index]}
        step = scheduler.step(run["outputs"][index], t, xt, guidance=run["gradients"][index], **noise)
        xt = run["xs"][index]
        assert_near(step.prev_sample, xt, 1e-6)


@pytest.mark.parametrize("name", ["ddim", "ddim_cosine"])
def test_ddim_of_diffusers_ends_at_the_originals_images(data_dir, name):
    """Where the respacing is a stride; its levels in float32 leave 1e-5 to 1e-4."""
    case, run = trajectory(data_dir, name)
    pipe = make_pipeline(case)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    images = pipe(run["y"], case["scale"], len(run["xs"]), latents=run["x"], output_type="latent").images
    assert (images - run["xs"][-1]).abs().max() <= 2e-4


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_guided_folder_is_complete(guided):
    pipe = ClassifierGuidedPipeline.from_pretrained(guided)
    assert type(pipe.unet) is diffusers.UNet2DModel
    assert isinstance(pipe.classifier, NoisyClassifier)
    assert pipe.config.default_guidance_scale == 4
    assert pipe.classifier.id2label == dict(enumerate("abcdefghij"))
    config = pipe.scheduler.config
    assert (config.beta_schedule, config.variance_type, config.respacing) == (
        "squaredcos_cap_v2",
        "learned_range",
        "10",
    )
    pipe.scheduler.set_timesteps()
    assert pipe.scheduler.timesteps.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["b", 3], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)


def test_an_unconditional_unet_alone_opens_as_ddpm_and_takes_a_classifier(checkpoints, guided, tmp_path):
    flags = as_text(network("unet.plain")[0]) + " --sigma_small True"
    unet = checkpoints / "unet.plain.pt"
    assert convert("guided-diffusion", "--unet", unet, "--flags", flags, "--output", tmp_path / "a", "--verify") == 0
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "a")
    assert type(pipe.unet) is diffusers.UNet2DModel
    assert type(pipe.scheduler) is diffusers.DDPMScheduler
    assert pipe.scheduler.config.variance_type == "fixed_small"
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(2, num_inference_steps=2, output_type="np").images) == 2
    classifier = NoisyClassifier.from_pretrained(guided, subfolder="classifier")
    classifier.register_to_config(noise_schedule=None)  # that of this classifier is another
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "a", classifier=classifier)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(["a", "b"], num_inference_steps=2, output_type="np").images) == 2


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_flat_folder_of_a_ddpm_takes_a_classifier(guided, tmp_path, safetensors):
    """As the first DDPMs on the Hub are: no folders of components, the config of each in the one there is."""
    from_folders = diffusers.DDPMPipeline.from_pretrained(make_ddpm(tmp_path / "folders"))
    from_folders.unet.save_pretrained(tmp_path / "flat", safe_serialization=safetensors)
    from_folders.scheduler.save_pretrained(tmp_path / "flat")
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1"}
    index |= {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "flat" / "model_index.json").write_text(json.dumps(index))
    weights = f"diffusion_pytorch_model.{'safetensors' if safetensors else 'bin'}"
    assert _choose_weights([path.name for path in (tmp_path / "flat").iterdir()], None) == [weights]  # of the Hub's
    classifier = NoisyClassifier.from_pretrained(guided, subfolder="classifier")
    classifier.register_to_config(noise_schedule=None)
    images = []
    for layout in ("folders", "flat"):
        pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / layout, classifier=classifier)
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe([1], 2.0, 2, torch.Generator().manual_seed(0), output_type="pt").images)
    assert torch.equal(*images)


def make_ddpm(folder):
    flags, state = network("unet.plain")
    diffusers.DDPMPipeline(load_unet(state, flags), diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def test_a_unet_that_diffusers_cannot_hold(checkpoints, guided, tmp_path):
    flags = as_text(network("unet.heads_over_widths")[0])
    unet, classifier = checkpoints / "unet.heads_over_widths.pt", checkpoints / "classifier.attention.pt"
    arguments = ["--unet", unet, "--flags", f"{TEXTS['classifier']} {flags}", "--verify", "--dtype", "float16"]
    assert convert("guided-diffusion", *arguments, "--output", tmp_path / "alone") == 0
    assert isinstance(diffusers.DDPMPipeline.from_pretrained(tmp_path / "alone").unet, ADMUNet)
    assert convert("guided-diffusion", *arguments, "--classifier", classifier, "--output", tmp_path / "guided") == 0
    assert {path.name for path in (tmp_path / "guided" / "unet").glob("*.py")} == {"adm_unet.py", "layers.py"}
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "guided", torch_dtype=torch.float16)
    assert isinstance(pipe.unet, ADMUNet)
    assert pipe.unet.dtype == torch.float16
    assert pipe.scheduler.config.variance_type == "learned_range"


def test_improved_diffusion_rescales_timesteps_by_default(checkpoints, tmp_path):
    flags = as_text(network("unet.plain")[0]) + " --diffusion_steps 4000 --noise_schedule cosine"
    unet = checkpoints / "unet.plain.pt"
    assert convert("improved-diffusion", "--unet", unet, "--flags", flags, "--output", tmp_path / "a", "--verify") == 0
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "a")
    assert pipe.unet.config.timestep_scale == 0.25
    assert pipe.scheduler.config.num_train_timesteps == 4000


def test_imagenets_names():
    assert len(set(IMAGENET_CLASSES)) == 1000
    named = {0: "tench", 1: "goldfish", 134: "crane (bird)", 207: "Golden Retriever", 388: "giant panda", 985: "daisy"}
    assert {index: IMAGENET_CLASSES[index] for index in named} == named
    assert IMAGENET_CLASSES[999] == "toilet paper"


# --- NCSN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "raw"), [(1, False), (2, False), (2, True)])
def test_ncsn_folders(data_dir, tmp_path, version, raw):
    config = {
        "data": {"image_size": 28, "channels": 1, "logit_transform": False, "rescaled": False},
        "model": {"ngf": 8, "num_classes": 10, "sigma_begin": 1, "sigma_end": 0.01},
    }
    if version == 2:
        config["sampling"] = {"n_steps_each": 3, "step_lr": 3.3e-6, "denoise": True}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    name = {1: "ncsn", 2: "ncsnv2"}[version]
    arguments = ["--checkpoint", data_dir / f"{name}_list.pt", "--config", tmp_path / "config.yml"]
    assert convert(name, *arguments, "--output", tmp_path / "out", "--verify", *["--raw"] * raw) == 0
    pipe = NCSNPipeline.from_pretrained(tmp_path / "out")
    expected = load_model(data_dir / f"{name}_list.pt", config, version, ema=not raw)
    x = torch.rand(1, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, 9).sample, expected(x, 9).sample)
    torch.testing.assert_close(pipe.scheduler.sigmas.float(), expected.sigmas)
    chosen = {key: pipe.scheduler.config[key] for key in ("steps_per_level", "step_size", "denoise_final")}
    originals = {
        1: {"steps_per_level": 100, "step_size": 2e-5, "denoise_final": False},
        2: {"steps_per_level": 3, "step_size": 3.3e-6, "denoise_final": True},
    }
    assert chosen == originals[version]


# --- refusals --------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.fixture
def bad_checkpoints(checkpoints, tmp_path):
    state = torch.load(checkpoints / "unet.adm.pt", weights_only=True)
    torch.save({**state, "extra": Malicious()}, tmp_path / "malicious.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    whole = (checkpoints / "unet.adm.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_text("<html>404</html>")
    (tmp_path / "truncated.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    torch.save({f"model.diffusion_model.{name}": value for name, value in state.items()}, tmp_path / "sd.pt")
    torch.save([state], tmp_path / "list.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("malicious.pt", "holds code or objects other than tensors"),
        ("pickle.pt", "holds code or objects other than tensors"),
        ("truncated.pt", "damaged or cut short"),
        ("empty.pt", "damaged or cut short"),
        ("page.pt", "no file of PyTorch's"),
        ("truncated.safetensors", "damaged or cut short"),
        ("sd.pt", "Stable Diffusion"),
        ("list.pt", "must be the file of a state dict"),
        ("missing.pt", "must be a file"),
    ],
)
def test_bad_files_are_refused_in_a_sentence_and_nothing_is_written(bad_checkpoints, capsys, monkeypatch, name, match):
    monkeypatch.chdir(bad_checkpoints)
    before = sorted(bad_checkpoints.iterdir())
    arguments = ["--unet", bad_checkpoints / name, "--flags", TEXTS["unet"], "--output", bad_checkpoints / "out"]
    assert convert("guided-diffusion", *arguments) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert sorted(bad_checkpoints.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "ncsn"}, "`version` must be 2"),
        ({"--checkpoint": "config.yml"}, "no file of PyTorch's"),
        ({"--config": "missing.yml"}, "`--config` must be a file"),
        ({"text": "data: ["}, "`config` must be the path of a YAML file"),
        ({"text": "data: {}"}, "`config` must have the parts"),
        ({"sigma_dist": "uniform"}, "geometric noise levels"),
    ],
)
def test_bad_ncsns_are_refused_and_nothing_is_written(data_dir, tmp_path, capsys, monkeypatch, change, match):
    monkeypatch.chdir(tmp_path)
    levels = {
        "num_classes": 10,
        "sigma_begin": 1,
        "sigma_end": 0.01,
        "sigma_dist": change.get("sigma_dist", "geometric"),
    }
    config = {"data": {"image_size": 28, "channels": 1}, "model": {"ngf": 8, **levels}}
    (tmp_path / "config.yml").write_text(change.get("text", yaml.safe_dump(config)))
    options = {"--checkpoint": data_dir / "ncsnv2_list.pt", "--config": "config.yml", "--output": "out"}
    options |= {name: value for name, value in change.items() if name in options}
    assert convert(change.get("format", "ncsnv2"), *[part for option in options.items() for part in option]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--flags", TEXTS["unet"] + " --num_channels 64"], "num_channels=32, not 64"),
        (["--preset", "256x256"], "num_channels=32, not 256"),
        ([], "`--flags` or `--preset` is missing"),
        (["--flags", TEXTS["unet"] + " --timestep_respacing ddim99"], "needs an integer stride"),
        (["--flags", TEXTS["unet"] + " --noise_schedule sqrt"], "`noise_schedule` must be one of"),
    ],
)
def test_flags_that_do_not_fit_are_refused_and_nothing_is_written(checkpoints, tmp_path, capsys, arguments, match):
    output = tmp_path / "out"
    assert convert("guided-diffusion", "--unet", checkpoints / "unet.adm.pt", "--output", output, *arguments) == 2
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_number_of_class_names_is_checked(checkpoints, tmp_path):
    names = {"unet": checkpoints / "unet.adm.pt", "classifier": checkpoints / "classifier.attention.pt"}
    flags = parse_flags(f"{TEXTS['classifier']} {TEXTS['unet']}")
    with pytest.raises(ValueError, match="`class_names` must have 10 names"):
        convert_guided_diffusion(**names, output=tmp_path / "out", flags=flags, class_names=["a"])
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_kept(guided, checkpoints, capsys):
    arguments = ["--unet", checkpoints / "unet.adm.pt", "--preset", "64x64", "--output", guided]
    assert convert("guided-diffusion", *arguments) == 2
    assert "`--output` must be a new or an empty folder" in capsys.readouterr().err
    assert (guided / "model_index.json").is_file()


def test_verification_finds_a_difference(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("hfdiff.convert.folder.load_adm_unet", lambda state, flags: load_unet(network_2(), flags))
    arguments = {"unet": checkpoints / "unet.adm.pt", "output": tmp_path / "out", "verify": True}
    with pytest.raises(ValueError, match="unet differs from the checkpoint's"):
        convert_guided_diffusion(**arguments, flags=parse_flags(TEXTS["unet"]))
    assert not list(tmp_path.iterdir())


def network_2():
    return {name: 2 * value for name, value in network("unet.adm")[1].items()}
