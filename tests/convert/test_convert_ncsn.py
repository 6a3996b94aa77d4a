"""Checkpoints of the original networks, against arrays frozen from ermongroup/ncsnv2 (1bcea03) and ncsn (7f27f4a).

ncsnv2_list.pt and ncsn_list.pt are checkpoints as their training saves them, with random weights; ncsn_lists.npz,
ncsnv2_28.npz, ncsn_v1_28.npz and ncsnv2_dsm.npz hold inputs and what the originals gave for them. Of the networks in
ncsn_architectures.npz only the names and shapes are kept, and `frozen_weights` fills them. CPU, float32, torch 2.13.0.
"""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from hfdiff import AnnealedLangevinScheduler
from hfdiff.convert.ncsn import load_model
from hfdiff.training.losses import score_matching_losses

CONFIG = {
    "data": {"image_size": 28, "channels": 1, "logit_transform": False, "rescaled": False},
    "model": {
        "ngf": 8,
        "num_classes": 10,
        "sigma_begin": 1,
        "sigma_end": 0.01,
        "sigma_dist": "geometric",
        "normalization": "InstanceNorm++",
        "nonlinearity": "elu",
        "spec_norm": False,
    },
}
CHECKPOINTS = {1: "ncsn_list.pt", 2: "ncsnv2_list.pt"}


def changed(part, **change):
    return {**CONFIG, part: {**CONFIG[part], **change}}


def load_arrays(path):
    return {key: torch.from_numpy(value) for key, value in np.load(path).items() if value.dtype.kind in "fi"}


def assert_near(actual, expected, tolerance):
    """Within a fraction of the largest value."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def check_score(model, arrays, prefix=""):
    """The score, and its product with a vector differentiated by the input."""
    x, w, labels = (arrays[f"{prefix}in.{name}"] for name in ("x", "w", "labels"))
    x.requires_grad_()
    score = model(x, model.config.num_levels - 1 - labels).sample
    (gradient,) = torch.autograd.grad((score * w).sum(), x)
    assert_near(score.detach(), arrays[f"{prefix}out.score"], 1e-5)
    assert_near(gradient, arrays[f"{prefix}out.vjp_x"], 1e-4)


@pytest.fixture
def raw(data_dir):
    """The raw weights of a version's checkpoint, as a bare state dict."""

    def load(version):
        state = torch.load(data_dir / CHECKPOINTS[version], weights_only=True)[0]
        return {name.removeprefix("module."): value for name, value in state.items()}

    return load


# --- the originals' numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "name"), [(1, "ncsn_v1_28"), (2, "ncsnv2_28")])
def test_scores_and_their_gradients_are_the_originals(data_dir, raw, version, name):
    check_score(load_model(raw(version), CONFIG, version), load_arrays(data_dir / f"{name}.npz"))


@pytest.mark.parametrize(
    ("version", "ema", "name"),
    [(1, False, "ncsn_v1"), (1, True, "ncsn_v1"), (2, False, "ncsnv2_raw"), (2, True, "ncsnv2_ema")],
)
def test_lists_hold_raw_and_averaged_weights(data_dir, version, ema, name):
    arrays = load_arrays(data_dir / "ncsn_lists.npz")
    model = load_model(data_dir / CHECKPOINTS[version], CONFIG, version, ema)
    with torch.no_grad():
        assert_near(model(arrays["in.x"], 9 - arrays["in.labels"]).sample, arrays[f"out.{name}"], 1e-5)


def frozen_weights(shapes):
    """Random weights by name; numpy's legacy generator gives the same numbers for ever."""
    random = np.random.RandomState(0)
    weights = {}
    for name in sorted(shapes):
        draw = random.standard_normal(shapes[name])
        draw = draw / np.prod(shapes[name][1:]) ** 0.5 if draw.ndim == 4 else 1 + 0.3 * draw
        weights[name] = torch.tensor(draw, dtype=torch.float32)
    return weights


@pytest.mark.parametrize("name", ["base_v1", "deeper_v1", "base_v2", "deeper_v2", "deepest_v2"])
def test_every_depth_activation_and_data_range(data_dir, name):
    arrays = np.load(data_dir / "ncsn_architectures.npz")
    config, shapes = (json.loads(str(arrays[f"{name}.{part}"])) for part in ("config", "shapes"))
    model = load_model(frozen_weights(shapes), config, version=config["version"])
    check_score(model, load_arrays(data_dir / "ncsn_architectures.npz"), prefix=f"{name}.")


def test_levels_are_the_originals_turned_round(data_dir, raw):
    state = raw(2)
    del state["sigmas"]
    for name, sigmas in load_arrays(data_dir / "ncsn_sigmas.npz").items():
        if name.startswith(("out.geometric", "out.uniform")):
            _, kind, begin, *_ = name.split(".")  # out.geometric.50.0.01.232
            config = changed("model", sigma_begin=int(begin), num_classes=len(sigmas), sigma_dist=kind)
            torch.testing.assert_close(load_model(state, config).sigmas, sigmas.flip(0), rtol=3e-7, atol=0)


@pytest.mark.parametrize("power", [1, 2])
def test_denoising_score_matching_loss(data_dir, raw, power):
    """½ σ^p ‖s(x + σ ε) + ε/σ‖², p = 2 in the papers."""
    arrays = load_arrays(data_dir / "ncsnv2_dsm.npz")
    model = load_model(raw(2), CONFIG)
    t = 9 - arrays["in.labels"]
    scheduler = AnnealedLangevinScheduler(10, float(model.sigmas[0]), float(model.sigmas[-1]))
    losses = score_matching_losses(model, scheduler, arrays["in.x"], t, arrays["in.noise"])
    per_sample = losses * model.sigmas[t] ** (power - 2)
    assert_near(per_sample.detach(), arrays[f"out.per_sample_power{power}"], 1e-5)
    assert_near(per_sample.mean().detach(), arrays[f"out.loss_power{power}"], 1e-5)
    if power == 2:
        (gradient,) = torch.autograd.grad(per_sample.mean(), model.net.conv_out.weight)
        assert_near(gradient, arrays["out.grad_end_conv_weight"], 1e-5)


def test_spectral_norm_is_folded(raw):
    state = raw(1)
    conv = torch.nn.utils.spectral_norm(torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)).eval()
    x = torch.randn(1, 8, 5, 5)
    name = "refine4.crp.convs.0."
    del state[name + "weight"]
    state.update({name + key: value for key, value in conv.state_dict().items()})
    folded = load_model(state, CONFIG, version=1).net.refine_blocks[3].crp.convs[0]
    torch.testing.assert_close(folded(x), conv(x))


# --- what may be given -----------------------------------------------------------------------------------------------


def namespace(kind, config):
    return kind(**{part: kind(**keys) for part, keys in config.items()})


@pytest.mark.parametrize("form", ["namespace", "argparse", "yaml", "dumped namespaces"])
def test_configurations_of_every_form(raw, tmp_path, form):
    path = tmp_path / "config.yml"
    if form == "dumped namespaces":  # the original saves its namespaces, a device among them
        full = namespace(argparse.Namespace, CONFIG)
        full.device = torch.Size([1])
        path.write_text(yaml.dump(full))
    else:
        path.write_text(yaml.safe_dump(CONFIG))
    forms = {"namespace": namespace(SimpleNamespace, CONFIG), "argparse": namespace(argparse.Namespace, CONFIG)}
    model = load_model(raw(2), forms.get(form, path))
    assert model.config == load_model(raw(2), CONFIG).config


def test_configurations_of_the_first_version_name_less(raw):
    data = {"image_size": 28, "channels": 1, "logit_transform": False, "random_flip": False}
    model = {"sigma_begin": 1, "sigma_end": 0.01, "num_classes": 10, "batch_norm": False, "ngf": 8}
    short = load_model(raw(1), {"data": data, "model": model}, version=1)
    assert short.config == load_model(raw(1), CONFIG, version=1).config


def test_conversion_survives_saving(raw, tmp_path):
    model = load_model(raw(1), CONFIG, version=1)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    x = torch.rand(1, 1, 28, 28)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(again(x, 9).sample, model(x, 9).sample)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"weight": SimpleNamespace()}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="code or objects other than tensors"):
        load_model(tmp_path / "checkpoint.pth", CONFIG)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_the_wrong_version_is_refused(raw, version):
    with pytest.raises(ValueError, match=f"`version` must be {version}"):
        load_model(raw(version), CONFIG, version=3 - version)
    with pytest.raises(ValueError, match="`version` must be 1 for NCSN or 2"):
        load_model(raw(version), CONFIG, version=3)


def test_missing_and_unexpected_weights_are_named(raw):
    state = raw(2)
    state["refine1.extra"] = state.pop("refine1.crp.convs.0.weight")
    with pytest.raises(ValueError, match=r"lacks 1 entries: refine1\.crp\.convs\.0\.weight\."):
        load_model(state, CONFIG)
    state["refine1.crp.convs.0.weight"] = state["refine1.extra"]
    with pytest.raises(ValueError, match=r"beyond the network's, 1 entries: refine1\.extra\."):
        load_model(state, CONFIG)


def test_a_missing_moving_average_is_refused(data_dir):
    checkpoint = torch.load(data_dir / "ncsnv2_list.pt", weights_only=True)
    for length in (2, 4):
        with pytest.raises(ValueError, match="ema=False"):
            load_model(checkpoint[:length], CONFIG)
    del checkpoint[4]["end_conv.bias"]
    with pytest.raises(ValueError, match=r"lacks the moving average of 1 entries: end_conv\.bias"):
        load_model(checkpoint, CONFIG)


@pytest.mark.parametrize("checkpoint", [3, [], [3], {}, {"weight": torch.zeros(1)}])
def test_what_is_no_checkpoint_is_refused(checkpoint):
    with pytest.raises(ValueError, match="`checkpoint`"):
        load_model(checkpoint, CONFIG)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (changed("model", ngf=16), r"begin_conv.bias \(8,\) instead of \(16,\)"),
        (changed("model", num_classes=11), "10 noise levels"),
        (changed("model", sigma_begin=50), "noise levels from 1 to 0.01"),
        (changed("model", sigma_dist="uniform"), "noise levels"),
        (changed("model", sigma_dist="cosine"), "sigma_dist"),
        (changed("model", normalization="BatchNorm"), "normalization"),
        (changed("model", nonlinearity="tanh"), "nonlinearity"),
        ({"data": CONFIG["data"], "model": {"ngf": 8}}, "lacks 3 entries: model.num_classes"),
        ({"model": CONFIG["model"]}, "`data` and `model`"),
        (None, "`data` and `model`"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(raw, config, match):
    with pytest.raises(ValueError, match=match):
        load_model(raw(2), config)
