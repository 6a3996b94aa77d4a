import numpy as np
import pytest
import torch

from hfdiff.evaluation.metrics import frechet_distance
from hfdiff.evaluation.statistics import RunningStatistics, feature_statistics, load_statistics, save_statistics


def test_by_hand():
    """(0, 0), (2, 4), (4, 2): mean (2, 2), squares (4 + 0 + 4) / 2 = 4, products (4 + 0 + 0) / 2 = 2."""
    found = feature_statistics(torch.tensor([[0, 0], [2, 4], [4, 2]]))
    assert found.mean.tolist() == [2, 2]
    assert found.covariance.tolist() == [[4, 2], [2, 4]]
    assert found.num_images == 3


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batches_give_numpys_covariance(batch):
    features = torch.randn(100, 5) @ torch.randn(5, 5) + 3
    running = RunningStatistics()
    for part in features.split(batch):
        running.update(part)
    found = running.finish()
    expected = features.double().numpy()
    np.testing.assert_allclose(found.mean, expected.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), rtol=1e-10, atol=1e-12)


def test_a_mean_far_from_zero_costs_no_precision():
    """Sums of squares minus squares of sums would keep none of the 16 digits: 1e8² + 1 = 1e16 + 1."""
    features = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(500, 1) + 1e8
    running = RunningStatistics()
    for part in features.split(8):
        running.update(part)
    assert running.finish().covariance.item() == pytest.approx(1000 / 999, rel=1e-12)


def test_memory_does_not_grow_with_the_images():
    running = RunningStatistics()
    for _ in range(3):
        running.update(torch.randn(64, 8))
        held = [value for value in vars(running).values() if isinstance(value, torch.Tensor)]
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 8 * (8 * 8 + 8)


def test_files_hold_the_names_of_pytorch_fid_and_guided_diffusion(tmp_path):
    pooled, spatial = feature_statistics(torch.randn(20, 3)), feature_statistics(torch.randn(20, 4))
    save_statistics(tmp_path / "new" / "both.npz", pooled, spatial, {"name": "net", "resize": "none"})
    with np.load(tmp_path / "new" / "both.npz") as file:
        np.testing.assert_array_equal(file["mu"], pooled.mean)
        np.testing.assert_array_equal(file["sigma"], pooled.covariance)
        np.testing.assert_array_equal(file["mu_s"], spatial.mean)
        np.testing.assert_array_equal(file["sigma_s"], spatial.covariance)
    loaded = load_statistics(tmp_path / "new" / "both.npz")
    assert torch.equal(loaded.pooled.covariance, pooled.covariance)
    assert torch.equal(loaded.spatial.mean, spatial.mean)
    assert loaded.pooled.num_images == 20
    assert loaded.features == {"name": "net", "resize": "none"}


def test_files_of_others_are_read(tmp_path):
    """Float32, mu and sigma only, as pytorch-fid and EDM leave them."""
    np.savez(tmp_path / "edm.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32))
    loaded = load_statistics(tmp_path / "edm.npz")
    assert loaded.pooled.mean.dtype == torch.float64
    assert loaded.pooled.num_images is None
    assert loaded.spatial is None
    assert loaded.features == {}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, "mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "shapes"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "symmetric"),
        ({"mu": np.array([0.0, np.nan]), "sigma": np.eye(2)}, "finite"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "variances of at least 0"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "must be numbers"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "provenance": np.asarray("mine")}, "bad.npz"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_statistics(tmp_path / "bad.npz")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and then nothing")
    for name in ("broken.npz", "absent.npz"):
        with pytest.raises(ValueError, match=name):
            load_statistics(tmp_path / name)
    with pytest.raises(ValueError, match=r"\.npz"):
        save_statistics(tmp_path / "file.pt", feature_statistics(torch.randn(3, 2)))


def test_features_that_fit_no_gaussian_are_refused():
    with pytest.raises(ValueError, match="at least 2 images"):
        feature_statistics(torch.ones(1, 3))
    with pytest.raises(ValueError, match="row 1"):
        feature_statistics(torch.tensor([[1.0], [float("nan")], [2.0]]))
    with pytest.raises(ValueError, match="shape"):
        feature_statistics(torch.ones(2, 3, 4))
    running = RunningStatistics()
    running.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="width"):
        running.update(torch.ones(2, 4))


@pytest.mark.parametrize(("kind", "name"), [("pool", "FID"), ("spatial", "sFID")])
def test_distance_equals_the_original_evaluators(data_dir, kind, name):
    frozen = np.load(data_dir / "evaluator.npz")
    reference, samples = (feature_statistics(frozen[f"in.{which}_{kind}"]) for which in ("ref", "sample"))
    found = frechet_distance(*samples[:2], *reference[:2])
    assert found == pytest.approx(frozen[f"out.{name}"], abs=1e-6)
