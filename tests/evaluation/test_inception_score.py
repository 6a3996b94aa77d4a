import math

import numpy as np
import pytest
import torch

from hfdiff.evaluation.inception_score import inception_score, split_inception_scores


@pytest.mark.parametrize("classes", [2, 10])
def test_sure_and_even_predictions_score_the_number_of_classes(classes):
    assert inception_score(torch.eye(classes).repeat(3, 1)) == pytest.approx(classes, abs=1e-12)


def test_equal_predictions_score_one():
    assert inception_score(torch.tensor([[0.2, 0.3, 0.5]]).repeat(7, 1)) == pytest.approx(1, abs=1e-12)


def test_two_unsure_classes_in_closed_form():
    """p(y|x) = (1-e, e) or (e, 1-e) and p(y) = (1/2, 1/2): the log of the score is log 2 less the binary entropy."""
    e = 0.1
    entropy = -(e * math.log(e) + (1 - e) * math.log(1 - e))
    probs = torch.tensor([[1 - e, e], [e, 1 - e]], dtype=torch.float64).repeat(4, 1)
    assert inception_score(probs, 1) == pytest.approx(2 * math.exp(-entropy), rel=1e-12)


def test_splits_are_consecutive():
    """Rows sorted by class: a split of one class scores 1, of two classes 2."""
    probs = torch.eye(4).repeat_interleave(3, dim=0)
    assert split_inception_scores(probs, 4).tolist() == pytest.approx([1, 1, 1, 1])
    assert split_inception_scores(probs, 2).tolist() == pytest.approx([2, 2])
    assert split_inception_scores(probs, split_size=6).tolist() == pytest.approx([2, 2])
    assert split_inception_scores(probs, split_size=9).tolist() == pytest.approx([3, 1])  # the last is what is left
    assert inception_score(probs, split_size=9) == pytest.approx(2)


@pytest.mark.parametrize(("size", "name"), [(5000, "IS"), (100, "IS_split100"), (200, "IS_split200")])
def test_equals_the_original_evaluator(data_dir, size, name):
    frozen = np.load(data_dir / "evaluator.npz")
    assert inception_score(frozen["in.sample_probs"], split_size=size) == pytest.approx(frozen[f"out.{name}"], abs=1e-6)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.zeros(3), "shape"),
        (torch.tensor([[0.5, 0.5], [2.0, -1.0]]), "row 1.*softmax"),
        (torch.tensor([[0.5, 0.6]]), "row 0"),
        (torch.tensor([[float("nan"), 1.0]]), "row 0"),
    ],
)
def test_other_than_probabilities_are_refused(probs, message):
    with pytest.raises(ValueError, match=message):
        inception_score(probs)


@pytest.mark.parametrize(("splits", "size"), [(0, 1), (4, 1), (None, 0)])
def test_splits_that_do_not_fit_are_refused(splits, size):
    with pytest.raises(ValueError, match="`splits`"):
        inception_score(torch.eye(3), splits, split_size=size)
