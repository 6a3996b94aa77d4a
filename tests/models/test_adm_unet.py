"""[`ADMUNet`]; its numbers are compared with the original's in tests/convert/test_convert_guided_diffusion.py."""

import pytest
import torch

from hfdiff import ADMUNet

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 2,
    "model_channels": 16,
    "channel_mult": (0.5, 1, 2),
    "attention_downsamples": (2, 4),
    "num_heads": 4,
    "num_heads_upsample": 2,
    "norm_num_groups": 4,
}


def make_unet(**changes):
    model = ADMUNet(**{**SMALL, **changes})
    for parameter in model.parameters():  # layers of zeros would hide what is before them
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_a_new_network_predicts_zero():
    assert not ADMUNet(**SMALL)(torch.randn(1, 1, 8, 8), 5).sample.any()


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7, 7]), torch.tensor([7.0, 7.0])])
def test_timesteps_of_every_kind(timestep):
    model, xt = make_unet(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        output = model(xt, timestep).sample
        assert output.shape == (2, 2, 8, 8)
        torch.testing.assert_close(output, model(xt, torch.full((2,), 7), return_dict=False)[0])
        assert (output - model(xt, 900).sample).abs().max() > 1e-3
        torch.testing.assert_close(make_like(model, timestep_scale=0.5)(xt, 2 * timestep).sample, output)


def make_like(model, **changes):
    other = ADMUNet(**{**SMALL, **changes})
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_any_size_that_halves():
    model = make_unet()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 16, 12), 3).sample.shape == (1, 2, 16, 12)


def test_classes_change_the_prediction_and_are_asked_for():
    model, xt = make_unet(num_class_embeds=3), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        first, second = model(xt[:1].expand(2, -1, -1, -1), 5, torch.tensor([0, 2])).sample
    assert (first - second).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`class_labels` are missing"):
        model(xt, 5)
    with pytest.raises(ValueError, match="this model has none"):
        make_unet()(xt, 5, torch.tensor([0, 1]))


def test_a_batch_is_its_images_one_by_one():
    model, xt, t = make_unet(), torch.randn(3, 1, 8, 8), torch.tensor([1, 400, 999])
    with torch.no_grad():
        alone = [model(xt[i : i + 1], t[i]).sample for i in range(3)]
        torch.testing.assert_close(model(xt, t).sample, torch.cat(alone))


def test_saving_keeps_the_network(tmp_path):
    model, xt = make_unet(num_class_embeds=3), torch.randn(1, 1, 8, 8)
    model.save_pretrained(tmp_path)
    again = ADMUNet.from_pretrained(tmp_path)
    with torch.no_grad():
        labels = torch.tensor([1])
        torch.testing.assert_close(again(xt, 3, labels).sample, model(xt, 3, labels).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype):
    model, xt = make_unet(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = model(xt, 100).sample
        half = model.to(dtype)(xt, 100).sample
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


def test_gradient_checkpointing_changes_nothing():
    model, xt = make_unet().train(), torch.randn(2, 1, 8, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(model(xt, 5).sample.square().sum(), xt)
    model.enable_gradient_checkpointing()
    (gradient,) = torch.autograd.grad(model(xt, 5).sample.square().sum(), xt)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sample_size": 6}, "sample_size"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"num_heads": 3}, "`num_heads` must divide the 16 channels"),
        ({"num_heads_upsample": 3}, "`num_heads` must divide"),
        ({"num_head_channels": 12}, "`num_head_channels` must divide"),
    ],
)
def test_impossible_configs_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        ADMUNet(**{**SMALL, **change})
