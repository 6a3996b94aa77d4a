"""Non-leaking augmentation: what a label says happened to the picture, and the saved model knows nothing of it."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor
from trainings import load_training

from hfdiff.data.labelled import LabelledImages
from hfdiff.training.batches import BatchStream
from hfdiff.training.geometry import ToldUNet, change, draw_labels

SIZE = 48
CENTRE, SPREAD = torch.tensor([3.0, -2.0]), torch.tensor([[9.0, 2.0], [2.0, 6.0]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def label(**entries: float) -> Tensor:
    """A label of 0, but for some entries, named i3 and so on."""
    label = torch.zeros(1, 9)
    for name, value in entries.items():
        label[0, int(name[1:])] = value
    return label


def places() -> Tensor:
    """(right, down) of the centre of every pixel, in pixels, (H, W, 2)."""
    line = torch.arange(SIZE) - (SIZE - 1) / 2
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)


def blob() -> Tensor:
    """A black bell on white, (1, 1, H, W)."""
    away = places() - CENTRE
    return 1 - 2 * torch.exp(-0.5 * (away @ SPREAD.inverse() * away).sum(-1))[None, None]


def moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Where the bell is, and its covariance."""
    weight = (1 - image[0, 0]) / (1 - image[0, 0]).sum()
    mean = (weight[..., None] * places()).sum((0, 1))
    away = places() - mean
    return mean, torch.einsum("hw,hwi,hwj->ij", weight, away, away)


def turn(degrees: float) -> Tensor:
    """Clockwise, where y points down."""
    w = math.radians(degrees)
    return torch.tensor([[math.cos(w), -math.sin(w)], [math.sin(w), math.cos(w)]])


CHANGES = {
    "mirrored left and right": (label(i0=1), torch.tensor([[-1.0, 0], [0, 1]]), [0, 0]),
    "mirrored up and down": (label(i1=1), torch.tensor([[1.0, 0], [0, -1]]), [0, 0]),
    "enlarged by √2": (label(i2=2.5), math.sqrt(2) * torch.eye(2), [0, 0]),
    "turned by 30°": (label(i3=math.sqrt(0.75) - 1, i4=0.5), turn(30), [0, 0]),
    "stretched by √2 along the rows": (label(i5=2.5), torch.diag(torch.tensor([2, 0.5]).sqrt()), [0, 0]),
    "stretched by √2 along the diagonal": (
        label(i6=2.5), turn(45) @ torch.diag(torch.tensor([2, 0.5]).sqrt()) @ turn(-45), [0, 0],
    ),
    "shifted": (label(i7=0.75, i8=-0.9), torch.eye(2), [SIZE / 8 * 0.75, SIZE / 8 * -0.9]),
    "turned, then shifted": (label(i3=-1, i4=1, i7=1), turn(90), [SIZE / 8, 0]),
    "enlarged, stretched, then shifted": (
        label(i2=-1.25, i5=2.5, i8=1), torch.diag(torch.tensor([2, 0.5]).sqrt()) * 2**-0.25, [0, SIZE / 8],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_label_says_what_happened_to_the_picture(name: str) -> None:
    given, linear, shift = CHANGES[name]
    mean, covariance = moments(change(blob(), given))
    torch.testing.assert_close(mean, linear @ CENTRE + torch.tensor(shift), atol=0.05, rtol=0)
    # cubics move a bell by hundredths and change its covariance by up to a tenth of a pixel
    torch.testing.assert_close(covariance, linear @ SPREAD @ linear.T, atol=0.15, rtol=0.01)


def test_whole_turns_and_shifts_move_pixels_and_repeat_the_border() -> None:
    images = torch.rand(1, 3, 8, 8, generator=generator()) * 2 - 1
    torch.testing.assert_close(change(images, label(i3=-1, i4=1)), images.rot90(-1, (-2, -1)), atol=1e-4, rtol=0)
    right = torch.cat([images[..., :1], images[..., :1], images[..., :-2]], dim=-1)
    torch.testing.assert_close(change(images, label(i7=2)), right, atol=1e-5, rtol=0)


def test_pictures_on_white_stay_on_white_and_in_range() -> None:
    images = torch.ones(500, 3, 16, 16)
    images[:, :, 5:11, 5:11] = -1
    labels = draw_labels(500, 1.0, generator())
    labels[:, 7:] = 0
    labels[:, 2] = labels[:, 2].clamp(max=0)
    labels[:, 5:7] = labels[:, 5:7].clamp(-1, 1)
    changed = change(images, labels)
    assert changed.abs().max() <= 1
    border = torch.cat([changed[:, :, 0], changed[:, :, -1], changed[..., 0], changed[..., -1]])
    torch.testing.assert_close(border, torch.ones_like(border), atol=1e-5, rtol=0)


def test_labels_of_unchanged_pictures_are_zero_and_each_change_has_its_probability() -> None:
    assert torch.equal(draw_labels(100, 0.0, generator()), torch.zeros(100, 9))
    labels = draw_labels(4000, 0.3, generator())
    drawn = (labels != 0).double().mean(0)
    expected = torch.tensor(
        [0.15, 0.15, 0.3, 0.3, 0.3, 0.3, 0.15, 0.3, 0.3]
    )  # half of the stretches are along the rows
    assert (drawn - expected).abs().max() < 0.03  # four standard deviations
    images = torch.rand(4000, 1, 4, 4, generator=generator()) * 2 - 1
    same = (change(images, labels) == images).flatten(1).all(1)
    assert torch.equal(same, (labels == 0).all(1))
    assert 0.7**4 * 0.85**2 - 0.03 < same.double().mean() < 0.7**4 * 0.85**2 + 0.03


def test_what_may_change_a_class_is_left_out_where_it_must_stay() -> None:
    data = LabelledImages(torch.rand(40, 1, 16, 16), torch.zeros(40, dtype=torch.long), ["a"])
    batch = BatchStream(data, 40, 100, 0, augment_probability=1.0, keep_class=True)(0)
    assert batch.augment_labels is not None
    mirrored_or_turned, others = batch.augment_labels[:, [0, 1, 3, 4]], batch.augment_labels[:, [2, 5, 7, 8]]
    assert (mirrored_or_turned == 0).all()
    assert (others != 0).all()
    plain = BatchStream(data, 40, 100, 0)(0)
    assert torch.equal(change(plain.x0, batch.augment_labels), batch.x0)


def test_a_batch_without_augmentation_has_the_same_bits_and_one_with_it_the_same_noise() -> None:
    data = LabelledImages(torch.rand(30, 1, 8, 8, generator=generator()) * 2 - 1, None, [])
    plain, off, on = (BatchStream(data, 10, 100, 0, augment_probability=p)(2) for p in (0.0, 0.0, 0.5))
    assert off.augment_labels is None
    assert torch.equal(plain.x0, off.x0)
    assert torch.equal(plain.noise, on.noise)
    assert torch.equal(plain.timestep, on.timestep)
    assert torch.equal(change(plain.x0, on.augment_labels), on.x0)
    again = BatchStream(data, 10, 100, 0, augment_probability=0.5)(2)
    assert torch.equal(again.x0, on.x0)


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=8,
    )  # fmt: skip


def test_the_unet_alone_is_the_one_that_is_told_nothing() -> None:
    unet = tiny_unet()
    told = ToldUNet(unet)
    xt, t = torch.randn(3, 1, 8, 8, generator=generator()), torch.tensor([0, 7, 19])
    labels = draw_labels(3, 1.0, generator())
    before = unet(xt, t).sample
    assert torch.equal(told(xt, t, augment_labels=labels).sample, before)  # it starts from 0
    torch.nn.init.normal_(told.label_embedding.weight, generator=generator())
    assert torch.equal(told(xt, t, augment_labels=torch.zeros(3, 9)).sample, before)
    assert torch.equal(told(xt, t).sample, before)
    assert not torch.allclose(told(xt, t, augment_labels=labels).sample, before, atol=1e-3)
    assert torch.equal(unet(xt, t).sample, before)  # nothing is left behind
    expected = told(xt, t, augment_labels=labels).sample[1]
    with torch.no_grad():  # what one image is told is a bias of the embedding
        unet.time_embedding.linear_2.bias += told.label_embedding(labels[1])
    torch.testing.assert_close(unet(xt, t).sample[1], expected)


def test_a_run_saves_a_plain_unet_and_resumes_with_what_told_it(tmp_path: Path) -> None:
    script, whole, resumed = load_training("ddpm"), tmp_path / "whole", tmp_path / "resumed"
    flags = [
        *("--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--attention_head_dim", "8"),
        *("--augment_probability", "0.5", "--max_train_steps", "4", "--checkpointing_steps", "2"),
        *("--train_batch_size", "8", "--lr_warmup_steps", "1", "--bits_per_dim_images", "0", "--sample_images", "2"),
        *("--sample_steps", "2", "--report_to", "none", "--gradient_checkpointing", "--logging_steps", "1"),
    ]
    script.main([*flags, "--output_dir", str(whole)])
    unet = DDPMPipeline.from_pretrained(whole).unet
    assert type(unet) is UNet2DModel
    saved = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == UNet2DModel.from_config(unet.config).state_dict().keys()
    average = load_file(whole / "checkpoint-4" / "average.safetensors")
    assert average.pop("label_embedding.weight").abs().max() > 0
    for name, tensor in average.items():
        assert torch.equal(tensor, saved[name.removeprefix("unet.")])
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    script.main([*flags, "--resume_from_checkpoint", "latest", "--output_dir", str(resumed)])
    for name in ("checkpoint-4/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    assert np.isfinite([float(line.split('"loss": ')[1].split(",")[0]) for line in (whole / "log.jsonl").open()]).all()
