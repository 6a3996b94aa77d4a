import numpy as np
import pytest
import torch
from tiny_models import SMALL

from hfdiff import NoisyClassifier
from hfdiff.models.layers import split_heads
from hfdiff.models.noisy_classifier import POOLS
from hfdiff.pipelines.guidance import classifier_gradient


def randomized(model):
    """Zero-initialised layers would hide what follows them."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_matches_guided_diffusion(data_dir):
    model = NoisyClassifier(
        sample_size=16,
        channel_mult=(1, 1),
        attention_downsamples=(2,),
        num_head_channels=32,
        pool="adaptive",
    ).eval()
    model.load_state_dict(torch.load(data_dir / "clf_adaptive.pt", weights_only=True))
    arrays = {key: torch.from_numpy(value) for key, value in np.load(data_dir / "clf_adaptive.npz").items()}
    xt, t, y = (arrays[f"in.{name}"] for name in ("x", "t", "y"))
    with torch.no_grad():
        logits = model(xt, t).logits
    expected = arrays["out.logits"]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    for scale in (1, 3, 10):
        gradient, expected = classifier_gradient(model, xt, t, y, float(scale)), arrays[f"out.grad_scale{scale}"]
        assert (gradient - expected).abs().max() <= 3e-4 * expected.abs().max()


def test_attention_orders_differ_only_in_their_rows():
    qkv = torch.arange(24.0).view(1, 1, 24)
    legacy, new = split_heads(qkv, 2, False), split_heads(qkv, 2, True)
    assert legacy[0].flatten().tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert new[0].flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert new[2].flatten().tolist() == [16, 17, 18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("resblock_updown", [False, True])
@pytest.mark.parametrize("use_scale_shift_norm", [False, True])
def test_last_layer_of_the_features_gives_the_logits(pool, resblock_updown, use_scale_shift_norm):
    config = {**SMALL, "pool": pool, "resblock_updown": resblock_updown, "use_scale_shift_norm": use_scale_shift_norm}
    model = randomized(NoisyClassifier(**config))
    xt, t = torch.randn(5, 1, 8, 8), torch.tensor([0, 10, 200, 500, 999])
    last = model.out[-1]
    last = getattr(last, "c_proj", last)
    with torch.no_grad():
        features = model.features(xt, t)
        expected = features @ last.weight.flatten(1).T + last.bias
        torch.testing.assert_close(model(xt, t).logits, expected)
    assert features.shape == (5, 2048 if pool.startswith("spatial") else 32)


def test_time_reaches_the_logits():
    model = randomized(NoisyClassifier(**SMALL))
    xt = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert (model(xt, 0).logits - model(xt, 900).logits).abs().max() > 1e-3


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7, 7]), torch.tensor([7.0, 7.0])])
def test_timesteps_of_every_kind(timestep):
    model = randomized(NoisyClassifier(**SMALL))
    xt = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(xt, timestep).logits, model(xt, torch.full((2,), 7)).logits)


def test_labels_survive_saving(tmp_path):
    names = {0: "zero", 1: "one", 2: "two"}
    model = randomized(NoisyClassifier(**SMALL, id2label=names))
    model.save_pretrained(tmp_path)
    again = NoisyClassifier.from_pretrained(tmp_path)
    assert again.id2label == names
    xt = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(xt, 3).logits, model(xt, 3).logits, rtol=0, atol=0)
    assert NoisyClassifier(**SMALL).id2label == {0: "0", 1: "1", 2: "2"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype):
    model = randomized(NoisyClassifier(**SMALL))
    xt = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = model(xt, 100).logits
        half = model.to(dtype)(xt, 100).logits
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


def test_gradient_checkpointing_changes_nothing():
    model = randomized(NoisyClassifier(**SMALL)).train()
    xt, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    expected = classifier_gradient(model, xt, 5, y)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(classifier_gradient(model, xt, 5, y), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pool": "mean"}, "pool"),
        ({"sample_size": 7}, "sample_size"),
        ({"norm_num_groups": 32}, "norm_num_groups"),
        ({"id2label": {0: "a", 1: "b"}}, "id2label"),
    ],
)
def test_impossible_configs_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        NoisyClassifier(**{**SMALL, **change})
