import pytest
import torch

from hfdiff.models.ncsn import NCSNModel
from hfdiff.models.ncsnv2 import NCSNv2Model
from hfdiff.models.refinenet import instance_norm_plus

SMALL = {"sample_size": 8, "in_channels": 1, "model_channels": 4, "num_levels": 5, "sigma_min": 0.1, "sigma_max": 1.6}
DEEPEST = {"channel_mult": (1, 2, 2, 2, 4, 4), "dilations": (1, 1, 1, 1, 2, 4), "sample_size": 16}
both = pytest.mark.parametrize("kind", [NCSNModel, NCSNv2Model])


def make(kind, **change):
    """A small model, no coefficient of which is 0 or 1."""
    model = kind(**{**SMALL, **change})
    for parameter in model.parameters():
        if parameter.ndim == 4:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
    return model.eval()


def score(model, sample, timestep):
    with torch.no_grad():
        return model(sample, timestep).sample


# --- InstanceNorm++ --------------------------------------------------------------------------------------------------


def test_flat_maps_are_told_apart_by_their_means_with_the_unbiased_variance():
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)  # m = 2, v² = 2 (biased: 1)
    gamma, alpha, beta = torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.0]])
    out = instance_norm_plus(x, gamma, alpha, beta)
    expected = torch.tensor([0.5 - 2**0.5, 3 * 2**0.5]).view(1, 2, 1, 1).expand_as(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_maps_of_equal_means_are_standardised_by_their_own_biased_variance():
    x = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 2, 2) * torch.tensor([1.0, 5.0]).view(1, 2, 1, 1) + 3
    one = torch.ones(1, 2)
    out = instance_norm_plus(x, 2 * one, one, one)
    torch.testing.assert_close(out, 1 + 2 * (x - 3).sign(), rtol=1e-4, atol=1e-4)


def test_each_image_takes_its_own_coefficients():
    x = torch.randn(3, 2, 4, 4)
    coefficients = [torch.randn(3, 2) for _ in range(3)]
    batch = instance_norm_plus(x, *coefficients)
    for i in range(3):
        alone = instance_norm_plus(x[i : i + 1], *(c[i : i + 1] for c in coefficients))
        torch.testing.assert_close(batch[i : i + 1], alone)


# --- noise levels ----------------------------------------------------------------------------------------------------


@both
def test_levels_grow_with_t(kind):
    torch.testing.assert_close(make(kind).sigmas, torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6]))
    assert make(kind, trained_sigmas=[0.1, 0.2, 0.3, 0.4, 0.5]).sigmas.tolist() == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )


def test_score_of_ncsnv2_falls_as_one_over_sigma():
    model, xt = make(NCSNv2Model), torch.rand(5, 1, 8, 8)
    scaled = score(model, xt, torch.arange(5)) * torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6]).view(5, 1, 1, 1)
    torch.testing.assert_close(scaled, score(model, xt, 0) * 0.1)


def test_ncsn_knows_each_level_by_its_own_row():
    model, xt = make(NCSNModel), torch.rand(5, 1, 8, 8)
    before = score(model, xt, torch.arange(5))
    with torch.no_grad():
        model.net.norm_out.embed.weight[3] += 1
    changed = (score(model, xt, torch.arange(5)) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_keep_their_precision_in_half_precision(dtype):
    model = make(NCSNv2Model, num_levels=2311, sigma_max=348.0, sigma_min=0.01)
    sigmas = model.sigmas.clone()
    assert torch.equal(model.to(dtype).sigmas, sigmas)
    assert len(sigmas.unique()) == 2311


# --- the networks ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("change", [{}, DEEPEST])
def test_a_batch_equals_its_images(kind, change):
    model, xt = make(kind, **change), torch.rand(3, 1, 16, 16)
    t = torch.tensor([0, 2, 4])
    batch = score(model, xt, t)
    assert batch.shape == xt.shape
    alone = torch.cat([score(model, xt[i : i + 1], int(t[i])) for i in range(3)])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


@both
@pytest.mark.parametrize("timestep", [2, torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2], dtype=torch.int32)])
def test_timesteps_of_every_kind(kind, timestep):
    model, xt = make(kind), torch.rand(2, 1, 8, 8)
    assert torch.equal(score(model, xt, timestep), score(model, xt, torch.tensor([2, 2])))


@both
@pytest.mark.parametrize("flag", ["rescaled", "logit_transform"])
def test_data_are_centred_inside_unless_they_come_so(kind, flag):
    model, xt = make(kind), torch.rand(2, 1, 8, 8)
    centred = kind(**{**SMALL, flag: True}).eval()
    centred.load_state_dict(model.state_dict())
    assert torch.equal(score(centred, 2 * xt - 1, 1), score(model, xt, 1))


@both
def test_only_undilated_levels_halve_the_image(kind):
    assert make(kind).factor == 2
    assert make(kind, **DEEPEST).factor == 8
    sizes = []
    model = make(kind, **DEEPEST)
    for stage in model.net.stages:
        stage[-1].register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[1:])))
    score(model, torch.rand(1, 1, 16, 32), 0)
    assert sizes == [(4, 16, 32), (8, 8, 16), (8, 4, 8), (8, 2, 4), (16, 2, 4), (16, 2, 4)]


@pytest.mark.parametrize(
    ("change", "parameters"),
    [  # counts of the original networks
        ({"sample_size": 32, "in_channels": 3, "model_channels": 128, "num_levels": 232}, 29_694_083),
        ({**DEEPEST, "sample_size": 64, "in_channels": 3, "model_channels": 64}, 23_542_979),
    ],
)
def test_networks_of_the_paper_have_as_many_parameters(change, parameters):
    with torch.device("meta"):
        model = NCSNv2Model(**{**SMALL, **change})
    assert model.num_parameters() == parameters


@both
def test_saving_keeps_every_bit(kind, tmp_path):
    model, xt = make(kind, trained_sigmas=[0.1, 0.2, 0.3, 0.4, 0.5], nonlinearity="swish"), torch.rand(2, 1, 8, 8)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert torch.equal(score(again, xt, 3), score(model, xt, 3))
    assert torch.equal(again.sigmas, model.sigmas)
    half = kind.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.sigmas, model.sigmas)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(kind, dtype):
    model, xt = make(kind), torch.rand(2, 1, 8, 8)
    expected = score(model, xt, 4)
    half = score(model.to(dtype), xt, 4)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


@both
def test_gradient_checkpointing_changes_nothing(kind):
    model, xt = make(kind).train(), torch.rand(2, 1, 8, 8)
    weights = list(model.parameters())
    expected = torch.autograd.grad(model(xt, 1).sample.square().sum(), weights)
    model.enable_gradient_checkpointing()
    for gradient, wanted in zip(torch.autograd.grad(model(xt, 1).sample.square().sum(), weights), expected):
        torch.testing.assert_close(gradient, wanted)


def test_tuples_and_outputs_hold_the_same():
    model, xt = make(NCSNv2Model), torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        (plain,) = model(xt, 0, return_dict=False)
    assert torch.equal(plain, score(model, xt, 0))


# --- refusals --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"nonlinearity": "gelu"}, "nonlinearity"),
        ({"dilations": (1, 1, 2)}, "dilations"),
        ({"dilations": (1, 1, 2, 0)}, "dilations"),
        ({"model_channels": 1}, "model_channels"),
        ({"sample_size": 7}, "sample_size"),
        ({"sigma_min": 2.0}, "sigma_min"),
        ({"num_levels": 1}, "num_levels"),
        ({"trained_sigmas": [0.1, 0.2]}, "trained_sigmas"),
        ({"trained_sigmas": [0.5, 0.4, 0.3, 0.2, 0.1]}, "ascending"),
    ],
)
def test_impossible_configs_are_refused(kind, change, match):
    with pytest.raises(ValueError, match=match):
        kind(**{**SMALL, **change})


@both
@pytest.mark.parametrize(
    ("shape", "timestep", "match"),
    [
        ((2, 1, 8, 8), 5, r"\[0, 5\)"),
        ((2, 1, 8, 8), -1, r"\[0, 5\)"),
        ((2, 1, 8, 8), torch.tensor([0, 5]), r"\[0, 5\)"),
        ((2, 1, 8, 8), 0.5, "integer"),
        ((2, 1, 8, 8), torch.tensor([0, 1, 2]), r"\(2,\)"),
        ((2, 3, 8, 8), 0, "sample"),
        ((2, 1, 7, 8), 0, "multiples of 2"),
        ((1, 8, 8), 0, "sample"),
    ],
)
def test_impossible_inputs_are_refused(kind, shape, timestep, match):
    with pytest.raises(ValueError, match=match):
        make(kind)(torch.zeros(shape), timestep)
