"""Drawing for evaluation: each image by the seed and its index alone."""

import json

import diffusers
import numpy as np
import pytest
import torch
from tiny_models import make_pipeline

from hfdiff import AnnealedLangevinScheduler, NCSNPipeline, NCSNv2Model
from hfdiff.sampling.opening import open_pipeline
from hfdiff.sampling.sampler import Sampler, one_thread
from hfdiff.sampling.settings import SamplingSettings
from hfdiff.sampling.streams import image_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pipelines of hfdiff's and one of diffusers'."""
    path = tmp_path_factory.mktemp("pipelines")
    make_pipeline().save_pretrained(path / "guided")
    diffusers.DDPMPipeline(make_pipeline().unet, diffusers.DDPMScheduler()).save_pretrained(path / "unconditional")
    scores = NCSNv2Model(16, 1, 8, num_levels=6, sigma_max=1.0)
    NCSNPipeline(scores, AnnealedLangevinScheduler(6, 0.01, 1.0, steps_per_level=1)).save_pretrained(path / "ncsn")
    return path


@pytest.fixture(scope="module")
def guided(folder):
    return open_pipeline(str(folder / "guided"))


def settings(**changes):
    return SamplingSettings(**{"num_images": 8, "num_inference_steps": 3, "sampling_batch_size": 4, **changes})


def labels(guided, count=7, **changes):
    return Sampler(guided, settings(num_images=count, **changes)).labels.tolist()


def test_no_two_images_have_the_same_noise():
    """Torch's generators on CPUs read 32 bits of a seed; a hash of (seed, index) would soon give some twice."""
    assert torch.equal(*(torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32)))
    seeds = {image_generator(seed, index).initial_seed() for seed in range(5) for index in range(2000)}
    assert len(seeds) == 5 * 2000
    assert max(seeds) < 2**32


@pytest.mark.parametrize("name", ["guided", "unconditional", "ncsn"])
def test_batches_are_the_same_in_any_order(folder, name):
    opened = open_pipeline(str(folder / name))
    sampler = Sampler(opened, settings(num_images=7))
    assert sampler.num_batches == 2
    whole = [sampler.draw(0), sampler.draw(1)]
    size = opened.pipe.unet.config.sample_size
    assert [batch.shape for batch in whole] == [(4, size, size, 1), (3, size, size, 1)]
    assert whole[0].dtype == np.uint8
    assert len({image.tobytes() for batch in whole for image in batch}) == 7
    torch.manual_seed(1)
    again = Sampler(opened, settings(num_images=7))
    assert (again.draw(1) == whole[1]).all()
    assert (again.draw(0) == whole[0]).all()
    assert (Sampler(opened, settings(num_images=7, seed=1)).draw(0) != whole[0]).any()


def test_an_image_does_not_depend_on_how_many_there_are(guided):
    few, many = (Sampler(guided, settings(num_images=count)).draw(0) for count in (4, 8))
    assert (few == many).all()
    alone = guided.pipe([0], generator=[image_generator(0, 0)], num_inference_steps=3, output_type="np").images
    assert np.abs(alone[0] * 255 - few[0]).max() <= 1  # sums of another order round differently


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_weights_are_where_torch_puts_tensors(folder, device):
    """The second device is that of several processes, where torch copies weights; kernels round by their address."""
    pipe = open_pipeline(str(folder / "guided"), device).pipe
    places = [tensor.data_ptr() % 64 for part in (pipe.unet, pipe.classifier) for tensor in part.parameters()]
    assert set(places) == {torch.empty(1).data_ptr() % 64}


def test_label_policies(guided):
    """Three classes: cat, dog and fox."""
    assert labels(guided) == [0, 1, 2, 0, 1, 2, 0]
    assert labels(guided, label_policy="given", class_labels=("fox", 0)) == [2, 0, 2, 0, 2, 0, 2]
    assert labels(guided, class_labels=("1",)) == [1] * 7
    drawn = labels(guided, 4000, label_policy="random")
    shares = torch.tensor(drawn).bincount() / 4000
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.03, rtol=0)  # 4 standard errors of 0.0075
    assert drawn == labels(guided, 4000, label_policy="random", sampling_batch_size=7)
    assert drawn != labels(guided, 4000, label_policy="random", seed=1)


def test_classes_and_scale_reach_the_pipeline(guided):
    """The tiny classifier's gradient is weak."""
    default, same, strong, others = (
        Sampler(guided, settings(**changes)).draw(0)
        for changes in (
            {},
            {"guidance_scale": 2.0},
            {"guidance_scale": 1e4},
            {"guidance_scale": 1e4, "class_labels": (2,)},
        )
    )
    assert (default == same).all()  # the tiny pipeline's own scale
    assert (default != strong).any()
    assert (strong[:2] != others[:2]).any()
    assert (strong[2] == others[2]).all()  # class 2 by turns, too


def test_a_scheduler_is_made_from_the_pipelines_own_each_time(guided):
    own = Sampler(guided, settings()).draw(0)
    swapped = Sampler(guided, settings(scheduler="DDIM"))
    assert isinstance(swapped.scheduler, diffusers.DDIMScheduler)
    assert swapped.scheduler.config.prediction_type == guided.scheduler.config.prediction_type
    assert (swapped.draw(0) != own).any()
    bridged = Sampler(guided, settings(scheduler="AnnealedLangevin", num_inference_steps=50))
    assert bridged.provenance["scheduler"] == "hfdiff.AnnealedLangevinScheduler"
    assert bridged.scheduler.config.sigma_schedule == "from_betas"
    named = Sampler(guided, settings(scheduler="DDPM"))  # hfdiff's, as the pipeline's own is one
    assert named.provenance["scheduler"] == "hfdiff.DDPMScheduler"
    assert (named.draw(0) == own).all()


def test_provenance_says_what_the_defaults_are(folder, guided):
    found = Sampler(guided, SamplingSettings(5, class_labels=("fox",), seed=3)).provenance
    assert found == json.loads(json.dumps(found))
    assert len(found.pop("pipeline_sha256")) == 64
    assert found == {
        "pipeline": str(folder / "guided"),
        "scheduler": "hfdiff.DDPMScheduler",
        "num_inference_steps": 50,
        "guidance_scale": 2.0,
        "label_policy": "given",
        "class_labels": ["fox"],
        "seed": 3,
        "num_images": 5,
        "sampling_batch_size": 50,
        "device": "cpu",
    }
    unconditional = Sampler(open_pipeline(str(folder / "unconditional")), SamplingSettings(5)).provenance
    assert (unconditional["num_inference_steps"], unconditional["label_policy"]) == (1000, None)


def test_one_thread_whatever_is_set(guided):
    threads = torch.get_num_threads()
    seen = []
    handle = guided.pipe.unet.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with one_thread():
        Sampler(guided, settings()).draw(0)
    handle.remove()
    assert set(seen) == {1}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "`num_images` must be at least 1"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        ({"seed": -1}, "`seed`"),
        ({"sampling_batch_size": 0}, "`sampling_batch_size`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be finite"),
        ({"label_policy": "even"}, "`label_policy` must be one of"),
        ({"label_policy": "given"}, "go together, got None with 'given'"),
        ({"label_policy": "random", "class_labels": (1,)}, "go together"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_what_the_pipeline_does_not_know_is_refused(folder, guided):
    unconditional = open_pipeline(str(folder / "unconditional"))
    for opened, changes, message in [
        (guided, {"class_labels": ("wolf",)}, "`class_labels` must be class indices or names"),
        (guided, {"class_labels": (3,)}, "`class_labels` must be between 0"),
        (guided, {"scheduler": "Magic"}, "must be a scheduler of diffusers"),
        (unconditional, {"label_policy": "balanced"}, "`label_policy` must be left out for a DDPMPipeline"),
        (unconditional, {"guidance_scale": 1.0}, "`guidance_scale` must be left out for a DDPMPipeline"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sampler(opened, settings(**changes))
    for name in (folder, folder / "guided" / "unet"):
        with pytest.raises(ValueError, match=r"`pipeline` must be a folder with model_index\.json"):
            open_pipeline(str(name))


def test_nan_is_no_image(guided):
    parameter = next(guided.pipe.unet.parameters())
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="The samples are not finite"):
        Sampler(guided, settings()).draw(1)
    with torch.no_grad():
        parameter.copy_(kept)
