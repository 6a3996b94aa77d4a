"""Folders of converted checkpoints: complete or not there, and sampling as the originals' code does.

adm_trajectories.npz holds runs of guided-diffusion's `p_sample_loop` and `ddim_sample_loop` (22e0df8) with the `cond_fn` of
classifier_sample.py, by the networks unet.adm and classifier.attention of adm_networks.npz: the noise of the start and of
each step, and every state. CPU, float32, torch 2.13.0.
"""

import inspect
import json
import os

import diffusers
import numpy as np
import pytest
import torch
import yaml
from adm_networks import as_text, classifier_flags, network

from hfdiff import ADMUNet, ClassifierGuidedPipeline, DDPMScheduler, NCSNPipeline, NoisyClassifier
from hfdiff.cli import main
from hfdiff.convert.flags import parse_flags
from hfdiff.convert.folder import convert_guided_diffusion
from hfdiff.convert.imagenet import IMAGENET_CLASSES
from hfdiff.convert.schedule import ddpm_config

TEXTS = {
    "unet": as_text(network("unet.adm")[0]),
    "classifier": as_text(classifier_flags(network("classifier.attention")[0]) | {"classifier_scale": 4}),
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
    flags = f"{TEXTS['unet']} {TEXTS['classifier']} --timestep_respacing 10 --noise_schedule cosine"
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
    flags, state = network("unet.adm")
    flags["learn_sigma"] = case.get("learn_sigma", True)
    if not flags["learn_sigma"]:
        state = network_without_variance()
    encoder, classifier = network("classifier.attention")
    chain = {
        "noise_schedule": case.get("schedule", "linear"),
        "diffusion_steps": case.get("steps", 1000),
        "rescale_timesteps": case.get("rescale", False),
        "timestep_respacing": case["respacing"],
        "learn_sigma": flags["learn_sigma"],
    }
    from hfdiff.convert.guided_diffusion import load_classifier, load_unet

    scheduler = DDPMScheduler(**ddpm_config({**parse_flags(""), **chain}))
    pipe = ClassifierGuidedPipeline(
        load_unet(state, {**flags, **chain}), load_classifier(classifier, {**encoder, **chain}), scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
