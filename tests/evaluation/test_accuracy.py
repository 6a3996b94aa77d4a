import pytest
import torch

from hfdiff.evaluation import class_accuracy


def test_by_hand():
    """Class 0: 2 of 2 as asked; class 1: 1 of 3; class 2 was not asked for, so it cannot be the worst."""
    probs = torch.tensor([[0.6, 0.4, 0], [0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    assert class_accuracy(probs, torch.tensor([0, 0, 1, 1, 1])) == (pytest.approx(3 / 5), pytest.approx(1 / 3))


def test_chance_and_certainty():
    labels = torch.arange(10).repeat(1000)
    assert class_accuracy(torch.nn.functional.one_hot(labels), labels) == (1, 1)
    overall, worst = class_accuracy(torch.rand(10_000, 10), labels)
    assert overall == pytest.approx(0.1, abs=0.012)  # 4 standard errors of 0.003
    assert 0.06 < worst < overall


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (torch.ones(3, 2), torch.tensor([0, 1]), "one label per image"),
        (torch.ones(2, 2), torch.tensor([0.0, 1.0]), "of integers"),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.long), "shapes"),
        (torch.ones(2, 2), torch.tensor([0, 2]), "classes of the classifier, from 0 to 1, got 0 to 2"),
        (torch.ones(2, 2), torch.tensor([-1, 1]), "got -1 to 1"),
    ],
)
def test_what_does_not_belong_together_is_refused(probs, labels, message):
    with pytest.raises(ValueError, match=message):
        class_accuracy(probs, labels)
