"""What cannot be measured ends `hfdiff evaluate` with one sentence and status 2, and no metric is printed."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_judge, make_pipeline

from hfdiff import cli
from hfdiff.evaluation.statistics import feature_statistics, save_statistics


def write_images(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of good things and bad ones."""
    path = tmp_path_factory.mktemp("bad")
    good = np.random.default_rng(0).integers(256, size=(6, 8, 8), dtype=np.uint8)
    write_images(path / "good", good)
    write_images(path / "empty", [])
    write_images(path / "single", good[:1])
    write_images(path / "mixed", [*good, good[0, :7]])
    write_images(path / "small", good[:, :4, :4])
    write_images(path / "truncated", good)
    (path / "truncated" / "3.png").write_bytes((path / "good" / "3.png").read_bytes()[:80])
    write_images(path / "colours", np.stack([good, good, good[::-1]], axis=-1))
    np.savez(path / "floats.npz", good[..., None] / 255)
    np.savez(path / "one.npz", good[:1, ..., None])
    np.savez(path / "good.npz", good[..., None])
    np.savez(path / "labelled.npz", good[..., None], np.arange(6))
    (path / "broken.npz").write_bytes((path / "good.npz").read_bytes()[:300])
    (path / "broken.parquet").write_bytes(b"PAR1 no parquet")

    judge = make_judge()
    judge.save_pretrained(path / "judge")
    with torch.no_grad():
        next(judge.parameters()).fill_(torch.nan)
    judge.save_pretrained(path / "nan_judge")
    judge.save_pretrained(path / "cut_judge")
    weights = next((path / "cut_judge").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    save_statistics(path / "wide.npz", feature_statistics(torch.randn(9, 5)))
    np.savez(path / "nan_statistics.npz", mu=np.full(8, np.nan), sigma=np.eye(8))
    np.savez(path / "no_statistics.npz", mu=np.zeros(8))

    make_pipeline().save_pretrained(path / "pipeline")
    make_pipeline().save_pretrained(path / "cut_pipeline")
    weights = next((path / "cut_pipeline" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    (path / "occupied").mkdir()
    (path / "occupied" / "notes.txt").touch()
    return path


DRAWN = ("--samples", "pipeline", "--num_images", "4", "--num_inference_steps", "1", "--samples_dir", "drawn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "empty"), "at least 2 images"),
        (("--samples", "single"), "at least 2 images"),
        (("--samples", "one.npz"), "at least 2 images"),
        (("--samples", "mixed"), "must have one size"),
        (("--samples", "truncated"), "3.png' cannot be read"),
        (("--samples", "floats.npz"), "uint8"),
        (("--samples", "broken.npz"), "broken.npz' cannot be read"),
        (("--samples", "broken.parquet"), "broken.parquet"),
        (("--samples", "nowhere/at/all"), "nowhere/at/all"),
        (("--samples", "colours"), "got colours"),
        (("--samples", "small"), "8 by 8 pixels, got 4 by 4"),
        (("--reference", "empty"), "at least 2 images"),
        (("--reference", "truncated"), "3.png' cannot be read"),
        (("--reference", "small"), "8 by 8 pixels, got 4 by 4"),
        (("--reference", "wide.npz"), "a width of 5 for 8"),
        (("--reference", "nan_statistics.npz"), "must be finite"),
        (("--reference", "no_statistics.npz"), "mu and sigma"),
        (("--reference", "wide.npz", "--metrics", "kid"), "only their statistics"),
        (("--features", "classifier:nan_judge"), "finite"),
        (("--features", "classifier:nan_judge", "--metrics", "is"), "must be probabilities"),
        (("--features", "classifier:cut_judge"), "cut_judge"),
        (("--features", "classifier:nowhere"), "`--features` must name"),
        (("--metrics", "fid,,is"), "`--metrics` must be some of"),
        (("--metrics", "copies"), "from 2 to the 6 images of the reference, got 50"),
        (("--metrics", "copies", "--held_out", "nowhere/at/all"), "`--held_out` must be there"),
        (("--metrics", "copies", "--samples", "small", "--copies_nearest", "3"), "1 by 4 by 4 for 1 by 8 by 8"),
        (("--metrics", "accuracy"), "must have labels for accuracy"),
        (("--samples", "labelled.npz", "--metrics", "accuracy"), "classes of the classifier, from 0 to 2"),
        (("--num_images", "4"), "`--num_images` is for samples drawn from a pipeline"),
        (("--samples", "pipeline"), "`--num_images` must say how many"),
        ((*DRAWN, "--num_images", "1"), "`--num_images` must be at least 2"),
        ((*DRAWN, "--class_labels", "wolf"), "`--class_labels` must be class indices or names"),
        ((*DRAWN, "--num_inference_steps", "1001"), "num_inference_steps"),
        ((*DRAWN, "--samples_dir", "occupied"), "holds files but no run.json"),
        ((*DRAWN, "--samples", "cut_pipeline"), "cut_pipeline"),
        ((*DRAWN, "--samples", "judge"), "judge"),
    ],
)
def test_one_sentence_and_status_2(bad, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(bad)
    usual = ["evaluate", "--samples", "good", "--reference", "good", "--features", "classifier:judge"]
    assert cli.main([*usual, "--metrics", "fid", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    told = [line for line in captured.err.splitlines() if line.startswith("hfdiff evaluate: ")]
    assert len(told) == 1
    assert message in told[0]
    assert "Traceback" not in captured.err


def test_the_good_ones_are_measured(bad, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    usual = ["evaluate", "--samples", "good", "--reference", "good.npz", "--features", "classifier:judge"]
    assert cli.main([*usual, "--metrics", "fid,kid"]) == 0
    assert capsys.readouterr().out.startswith("fid ")
