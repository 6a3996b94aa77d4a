"""Networks of guided-diffusion (22e0df8) and improved-diffusion (1bc7bbb), against what the originals gave.

adm_networks.npz holds flags, names and shapes of small networks, what they made of the inputs of `adm_networks.case`,
and its gradient; `frozen_weights` fills them. CPU, float32, torch 2.13.0.
"""

import diffusers
import pytest
import torch
from adm_networks import as_text, assert_near, case, classifier_flags, names, network
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfdiff import ADMUNet, NoisyClassifier
from hfdiff.convert.flags import IMPROVED_DEFAULTS, parse_flags
from hfdiff.convert.guided_diffusion import load_adm_unet, load_classifier, load_unet
from hfdiff.convert.presets import PRESETS
from hfdiff.pipelines.guidance import classifier_gradient

IN_UNET2D = ["unet.adm", "unet.plain", "unet.improved"]  # the networks that diffusers' class can hold


def forward(model, name):
    x, t, y, w, *_ = case(name)
    x.requires_grad_()
    conditional = model.config.get("num_class_embeds") is not None
    output = model(x, t, **({"class_labels": y} if conditional else {}), return_dict=False)[0]
    (gradient,) = torch.autograd.grad((output * w).sum(), x)
    return output.detach(), gradient


def check(model, name):
    output, gradient = forward(model, name)
    *_, expected, expected_gradient = case(name)
    assert_near(output, expected, 1e-5)
    assert_near(gradient, expected_gradient, 5e-5)


# --- the originals' numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("unet"))
def test_unets_and_their_gradients_are_the_originals(name):
    flags, state = network(name)
    model = load_unet(state, flags)
    assert type(model) is (diffusers.UNet2DModel if name in IN_UNET2D else ADMUNet)
    assert not model.training
    check(model, name)


@pytest.mark.parametrize("name", IN_UNET2D)
def test_adm_unet_holds_what_diffusers_can_hold_too(name):
    flags, state = network(name)
    check(load_adm_unet(state, flags), name)


@pytest.mark.parametrize("name", names("classifier"))
def test_classifiers_and_their_gradients_are_the_originals(name):
    flags, state = network(name)
    check(load_classifier(state, flags), name)
    heads = {"num_heads": flags.get("num_heads", 1)}
    check(load_classifier(state, {"image_size": 8, **heads, **classifier_flags(flags)}), name)


def test_gradient_checkpointing_changes_nothing():
    for name in ("unet.plain", "unet.heads_upsample"):
        flags, state = network(name)
        model = load_unet(state, {**flags, "use_checkpoint": True})
        assert model.is_gradient_checkpointing
        check(model, name)


@pytest.mark.parametrize("name", ["unet.adm", "unet.heads_over_widths"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(name, dtype):
    flags, state = network(name)
    x, t, y, _, expected, _ = case(name)
    model = load_unet(state, flags).to(dtype)
    labels = {"class_labels": y} if flags["class_cond"] else {}
    with torch.no_grad():
        output = model(x.to(dtype), t, **labels).sample
    assert output.dtype == dtype
    assert_near(output.float(), expected, 0.1 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("name", ["unet.adm", "unet.heads_over_widths", "unet.size_512", "classifier.attention"])
def test_attention_runs_in_fused_kernels(name):
    flags, state = network(name)
    model = (load_classifier if name.startswith("classifier") else load_unet)(state, flags)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # no other is allowed
        check(model, name)


def test_rescaled_timesteps_are_the_schedulers():
    """With 4,000 steps and `rescale_timesteps`, the original gives its networks t/4."""
    flags, state = network("unet.plain")
    x, t, *_ = case("unet.plain")
    scaled = load_unet(state, {**flags, "diffusion_steps": 4000, "rescale_timesteps": True})
    with torch.no_grad():
        torch.testing.assert_close(scaled(x, 4 * t).sample, load_adm_unet(state, flags)(x, t).sample)
    assert type(load_unet(state, {**flags, "rescale_timesteps": True})) is diffusers.UNet2DModel
    encoder, state = network("classifier.attention")
    x, t, y, *_ = case("classifier.attention")
    scaled = load_classifier(state, {**encoder, "diffusion_steps": 4000, "rescale_timesteps": True})
    expected = classifier_gradient(load_classifier(state, encoder), x, t, y)
    torch.testing.assert_close(classifier_gradient(scaled, x, 4 * t, y), expected)


# --- flags -----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_functions_or_the_scripts():
    """`create_model` takes one head, the scripts four; what the weights show decides between the two."""
    flags, state = network("unet.improved")
    assert "use_scale_shift_norm" not in flags
    del flags["num_heads"]
    assert load_unet(state, flags).config.attention_head_dim == 64 // 4
    flags, state = network("unet.plain")
    del flags["num_heads"]
    assert load_unet(state, flags).config.attention_head_dim == 64


def test_flags_as_text_and_of_every_type():
    flags, state = network("unet.adm")
    expected = load_unet(state, flags).config
    assert load_unet(state, as_text(flags)).config == expected
    typed = {**flags, "channel_mult": [1, 2], "attention_resolutions": 4, "learn_sigma": "True", "num_channels": "32"}
    assert load_unet(state, typed).config == expected
    pasted = (
        'python classifier_sample.py $MODEL_FLAGS \\\n --batch_size 4 --use_ddim True --num_classes=10 --lr "1e-4" '
    )
    assert load_unet(state, pasted + as_text(flags)).config == expected


def test_a_text_of_both_networks_means_the_classifiers_own():
    """`use_new_attention_order` and `channel_mult` are the UNet's there."""
    unet_flags, _ = network("unet.adm")
    encoder, state = network("classifier.spatial_v2")
    text = as_text(classifier_flags(encoder)) + " " + as_text(unet_flags)
    assert load_classifier(state, text).config == load_classifier(state, encoder).config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_flags(name):
    preset = PRESETS[name]
    flags = parse_flags(preset.flags, IMPROVED_DEFAULTS) if preset.improved else parse_flags(preset.flags)
    assert flags["learn_sigma"]
    assert flags["class_cond"] == ("uncond" not in name and "lsun" not in name)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("--num_chanels 64", "did you mean 'num_channels'"),
        ("--learn_sigma maybe", "`learn_sigma` must be True or False"),
        ("--image_size big", "`image_size` must be of type int"),
        ("--large_size 256 --small_size 64", "super-resolution"),
        ("image_size 64", "where a name should stand"),
        ('--channel_mult "1,2', "quotation mark"),
    ],
)
def test_flags_that_cannot_be_read_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        parse_flags(text)


# --- weights that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_channels": 64}, "num_channels=32, not 64"),
        ({"num_res_blocks": 2}, "num_res_blocks=1, not 2"),
        ({"channel_mult": "1,1"}, "channel_mult=1,2, not 1,1"),
        ({"attention_resolutions": "8"}, "attention_resolutions=4, not 8"),
        ({"class_cond": False}, "class_cond=True, not False"),
        ({"learn_sigma": False}, "learn_sigma=True, not False"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm=True, not False"),
        ({"resblock_updown": False}, "resblock_updown=True, not False"),
        ({"num_head_channels": 24}, "`num_head_channels` must divide the 64 channels"),
        ({"channel_mult": "", "image_size": 8}, "`channel_mult` must be given for `image_size` 8"),
        ({"unknown": 1}, "`flags` must be the original's, got 'unknown'"),
        ({"small_size": 64}, "super-resolution"),
    ],
)
def test_a_wrong_flag_of_a_unet_is_named(change, match):
    flags, state = network("unet.adm")
    with pytest.raises(ValueError, match=match):
        load_unet(state, {**flags, **change})


def test_another_sizes_flags_are_named():
    flags, state = network("unet.size_512")
    with pytest.raises(ValueError, match="image_size=512, not 256"):
        load_unet(state, {**flags, "image_size": 256})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_channels": 64}, "model_channels=32, not 64"),
        ({"num_res_blocks": 2}, "num_res_blocks=1, not 2"),
        ({"attention_resolutions": [1]}, "attention_resolutions=4, not 8"),
        ({"out_channels": 7}, "num_classes=10, not 7"),
        ({"pool": "spatial"}, "pool=attention, not spatial"),
        ({"image_size": 16}, "image_size=8, not 16"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm=True, not False"),
    ],
)
def test_a_wrong_flag_of_a_classifier_is_named(change, match):
    encoder, state = network("classifier.attention")
    with pytest.raises(ValueError, match=match):
        load_classifier(state, {**encoder, **change})


def test_missing_unexpected_and_misshaped_weights_are_listed():
    flags, state = network("unet.adm")
    state["extra"] = state.pop("out.0.bias")
    state["time_embed.0.bias"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"1 missing \(out.0.bias\), 1 unexpected \(extra\), 1 of another shape \(time"
    ):
        load_unet(state, flags)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": 0}, "Stable Diffusion"),
        ({"input_blocks.1.1.transformer_blocks.0.norm1.weight": 0}, "Stable Diffusion"),
        ({"down_blocks.0.resnets.0.norm1.weight": 0}, "from_pretrained"),
        ({"module.begin_conv.weight": 0}, "hfdiff convert ncsn"),
        ({"state": {}, "param_groups": []}, "optimizer"),
        ({"epoch": 3, "state_dict": {}}, "holds a state dict"),
        ({"weight": 0}, "something else: it lacks"),
        ({}, "something else: it lacks"),
    ],
)
@pytest.mark.parametrize("load", [load_unet, load_classifier])
def test_other_checkpoints_are_recognised(load, state, match):
    with pytest.raises(ValueError, match=match):
        load(state, {"image_size": 64})


def test_unet_and_classifier_are_not_mistaken():
    flags, unet = network("unet.adm")
    encoder, classifier = network("classifier.attention")
    with pytest.raises(ValueError, match="and is the classifier"):
        load_unet(classifier, flags)
    with pytest.raises(ValueError, match="and is the UNet"):
        load_classifier(unet, encoder)


def test_super_resolution_weights_are_refused():
    flags, state = network("unet.adm")
    state["input_blocks.0.0.weight"] = torch.zeros(32, 6, 3, 3)
    with pytest.raises(ValueError, match="super-resolution"):
        load_unet(state, flags)


def test_conversion_survives_saving(tmp_path):
    for load, name in ((load_unet, "unet.heads_over_widths"), (load_classifier, "classifier.attention")):
        flags, state = network(name)
        model = load(state, flags)
        model.save_pretrained(tmp_path / name)
        check(type(model).from_pretrained(tmp_path / name), name)
    assert isinstance(model, NoisyClassifier)
