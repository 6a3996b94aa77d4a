"""Copies of training images: seen while a model trains, and the weights from before they set in are kept."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hfdiff.data.labelled import LabelledImages
from hfdiff.training.copying import CopyWatch, keep_weights, take_weights_before_copies


def noise(count: int, seed: int) -> Tensor:
    return torch.randint(256, (count, 1, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def dataset(images: Tensor) -> LabelledImages:
    return LabelledImages(images.float() / 127.5 - 1, None, [])


KNOWN, UNSEEN, DRAWN = noise(100, 0), noise(40, 1), noise(20, 2)
DATA, HELD_OUT = dataset(KNOWN), dataset(UNSEEN)
COPIED = torch.cat([KNOWN[:3].flip(-1), DRAWN[3:]])  # mirrored copies, too


def test_planted_copies_are_found_mirrored_or_not() -> None:
    watch = CopyWatch(DATA, HELD_OUT)
    for drawn, share in ((DRAWN, 0.0), (COPIED, 0.15), (KNOWN[:20], 1.0)):
        found = watch.measure(drawn)
        assert found["copies"] == pytest.approx(share)
        assert found["copies_held_out"] <= 0.025
    assert CopyWatch(DATA, None).measure(COPIED) == {"copies": pytest.approx(0.15)}
    assert CopyWatch(dataset(KNOWN[:49]), None).measure(DRAWN) == {}  # too few to tell


def test_unseen_twins_of_training_images_do_not_hide_copies() -> None:
    """A tenth of the unseen images are twins; samples that are copies stay copies at the same threshold."""
    twins = dataset(torch.cat([KNOWN[:4], UNSEEN[4:]]))
    assert CopyWatch(DATA, twins).measure(COPIED) == {"copies": pytest.approx(0.15), "copies_held_out": 0.1}


def run_of(folder: Path, model: nn.Linear, *draws: Tensor, held_out: LabelledImages | None = HELD_OUT) -> None:
    """A run whose weights are the step's number, and its samples those given."""
    with (folder / "validation.jsonl").open("w") as file:
        for step, images in enumerate(draws, start=1):
            nn.init.constant_(model.weight, step)
            numbers = CopyWatch(DATA, held_out).measure(images)
            keep_weights(model, folder, step, numbers)
            file.write(json.dumps({"step": step, **numbers}) + "\n")


def test_the_weights_from_before_copies_set_in_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 2)
    run_of(tmp_path, model, DRAWN, DRAWN, COPIED, COPIED)
    assert take_weights_before_copies(model, tmp_path)["step"] == 2
    assert model.weight.eq(2).all()
    assert "After step 4, 15% of the samples copy training images" in (said := capsys.readouterr().err)
    assert "the weights of step 2, from before, are kept" in said


def test_without_copies_or_held_out_images_the_last_weights_stay(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for draws, held_out in (((DRAWN, COPIED, DRAWN), HELD_OUT), ((DRAWN, DRAWN, COPIED), None)):
        run_of(tmp_path, model, *draws, held_out=held_out)
        assert take_weights_before_copies(model, tmp_path)["step"] == 3
        assert model.weight.eq(3).all()


def test_copies_from_the_start_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 2)
    run_of(tmp_path, model, COPIED)
    assert take_weights_before_copies(model, tmp_path)["step"] == 1
    assert "no validation was before that: give `--validation_steps`" in capsys.readouterr().err
