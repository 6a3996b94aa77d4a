"""Whether samples have the data's mean colour, and what is said when they have not."""

import pytest
import torch
from torch import Tensor

from hfdiff.data.labelled import LabelledImages
from hfdiff.training.colour import ColourDrift, describe
from hfdiff.training.monitor import drawn_classes
from hfdiff.training.settings import DDPMSettings


def flat(colours: Tensor) -> Tensor:
    """Images of one colour each, (N, C) to (N, C, 2, 2)."""
    return colours[:, :, None, None].expand(-1, -1, 2, 2)


def as_bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8)


def test_drift_is_in_standard_errors_of_as_many_images_of_the_data() -> None:
    colours = torch.tensor([[-0.5, 0.0, 0.2], [0.5, 0.2, 0.2]]).repeat(50, 1)  # deviations 0.5, 0.1 and 0
    drift = ColourDrift(LabelledImages(flat(colours), None, []), None, "epsilon")
    samples = as_bytes(flat(torch.tensor([[0.2, 0.0, 0.2]]).expand(25, -1)))
    away = drift.measure(samples)
    assert away["drift_red"] == pytest.approx(0.2 / (0.5 / 5), abs=0.05)  # bytes are 0.008 apart
    assert away["drift_green"] == pytest.approx(-0.1 / (0.1 / 5), abs=0.25)
    assert away.keys() == {"drift_red", "drift_green", "drift_blue"}


def test_images_of_the_data_themselves_drift_by_about_one() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(2000, 1, 2, 2, generator=generator) * 2 - 1
    drift = ColourDrift(LabelledImages(data, None, []), None, "epsilon")
    away = torch.tensor([drift.measure(as_bytes(part))["drift_grey"] for part in data.split(50)])
    assert 0.7 < away.std() < 1.3
    assert away.abs().max() < 4


def test_classes_count_as_often_as_they_are_drawn() -> None:
    """Class 0 is black and has most images, class 1 is white."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    data = LabelledImages(flat(labels[:, None] * 2.0 - 1), labels, ["black", "white"])
    alike = as_bytes(flat(torch.tensor([[-1.0], [1.0]])))
    for settings in (DDPMSettings(balance_classes=True), DDPMSettings(class_conditional=True, sample_images=2)):
        drift = ColourDrift(data, drawn_classes(settings, data), "epsilon")
        assert drift.measure(alike)["drift_grey"] == pytest.approx(0, abs=1e-6)
    three = drawn_classes(DDPMSettings(class_conditional=True, sample_images=3), data)
    assert ColourDrift(data, three, "epsilon").expected[0].item() == pytest.approx(-1 / 3)
    assert drawn_classes(DDPMSettings(), data) is None
    assert ColourDrift(data, None, "epsilon").expected[0].item() == pytest.approx(-0.8)


def test_it_is_said_when_the_colour_leaves_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    drift = ColourDrift(LabelledImages(torch.zeros(2, 3, 2, 2), None, []), None, "epsilon")
    said = []
    for value, again in ((6.0, False), (7.0, False), (2.0, False), (-8.0, False), (9.0, True), (1.0, True)):
        drift.warn({"drift_red": value, "drift_green": 0.5}, 64, again=again)
        said.append(capsys.readouterr().err)
    assert [bool(text) for text in said] == [True, False, False, True, True, False]
    assert "red by +6.0, green by +0.5 standard errors of the mean of 64 images" in said[0]


def test_the_remedy_depends_on_what_is_predicted() -> None:
    assert "`--prediction_type v_prediction` or `sample` keeps it" in describe({"drift_grey": 9.0}, 4, "epsilon")
    assert "train longer" in describe({"drift_grey": 9.0}, 4, "v_prediction")
