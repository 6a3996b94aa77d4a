import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_judge
from torch import nn

from hfdiff.commands import evaluate as command
from hfdiff.data.image_source import images_in_memory
from hfdiff.evaluation.accuracy import class_accuracy
from hfdiff.evaluation.copies import measure_copies
from hfdiff.evaluation.evaluate import Evaluator, evaluate
from hfdiff.evaluation.feature_set import Reference, compute_statistics, open_reference
from hfdiff.evaluation.features import ImageFeatures, ModuleFeatures
from hfdiff.evaluation.inception_score import inception_score
from hfdiff.evaluation.kernel_distance import kernel_inception_distance
from hfdiff.evaluation.metric_set import METRICS, EvaluationSettings
from hfdiff.evaluation.metrics import frechet_distance
from hfdiff.evaluation.neighbours import APART, CELL, GAP, LEFT, TOP
from hfdiff.evaluation.precision_recall import precision_recall
from hfdiff.evaluation.report import read_report
from hfdiff.evaluation.statistics import feature_statistics, save_statistics


class Corner(nn.Module):
    """Three kinds of features of the first four, five and three pixels."""

    def forward(self, images):
        pixels = images.flatten(1).double() / 255
        return ImageFeatures(pixels[:, :4], pixels[:, 4:7].softmax(dim=1), pixels[:, :5].cos())


class NoClasses(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :4].float() / images[:, 0, 0, :1]  # NaN where the first pixel is 0


@pytest.fixture
def corner():
    return ModuleFeatures(Corner(), "corner")


def random_images(count, seed, least=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


SAMPLES, REAL = random_images(60, 0), random_images(50, 1)
LABELS = torch.arange(60) % 3
SETTINGS = EvaluationSettings(batch_size=17, is_split_size=30, kid_subset_size=20, kid_num_subsets=5, seed=3)


def test_metrics_are_those_of_the_features(corner):
    samples = images_in_memory(SAMPLES, labels=LABELS)
    report = evaluate(samples, Reference(images_in_memory(REAL)), corner, list(METRICS), SETTINGS)
    fake, real = Corner()(SAMPLES), Corner()(REAL)
    generator = torch.Generator().manual_seed(3)
    precision, recall = precision_recall(real.pooled, fake.pooled)
    expected = {
        "fid": frechet_distance(*feature_statistics(fake.pooled)[:2], *feature_statistics(real.pooled)[:2]),
        "is": inception_score(fake.probs, 2),
        "kid": kernel_inception_distance(real.pooled, fake.pooled, subset_size=20, num_subsets=5, generator=generator),
        "precision": precision,
        "recall": recall,
        "sfid": frechet_distance(*feature_statistics(fake.spatial)[:2], *feature_statistics(real.spatial)[:2]),
        "copies": measure_copies(SAMPLES, REAL).share,
        "copies_features": measure_copies(fake.pooled, real.pooled).share,
        "accuracy": class_accuracy(fake.probs, LABELS).overall,
        "worst_class_accuracy": class_accuracy(fake.probs, LABELS).worst,
    }
    assert {name: report.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert report.metrics["fid_infinity"] < report.metrics["fid"]
    assert set(report.spread) == {"is", "kid"}


def test_copies_are_read_with_what_held_out_images_get(corner):
    """Four random pixels have few dimensions, where chance alone passes 1/2; 64 have many, where nothing does."""
    samples, held_out = SAMPLES.clone(), random_images(100, 5)
    samples[:6] = REAL[:6]
    reference = Reference(images_in_memory(REAL), held_out=images_in_memory(held_out, "unseen"))
    report = evaluate(images_in_memory(samples), reference, corner, ["copies", "copies_features"])
    assert report.metrics["copies"] == 0.1
    assert report.beside["copies"] == {"held_out": 0, "threshold": 0.5}
    beside = report.beside["copies_features"]
    found = measure_copies(*(Corner()(images).pooled for images in (samples, REAL, held_out)))
    assert report.metrics["copies_features"] == found.share >= 0.1
    assert beside["held_out"] == 0.01
    assert beside["threshold"] == found.threshold < 0.5
    assert beside["at_0.5"] > found.share
    assert beside["held_out_at_0.5"] > 0.01
    assert report.reference["held_out"] == {"source": "unseen", "num_images": 100}
    assert report.settings["copies_nearest"] == 50
    assert "copies           0.1 (held_out 0, threshold 0.5)" in report.to_table()


def test_copies_of_other_shapes_are_refused_before_the_images_are_read(corner):
    small, real = images_in_memory(SAMPLES[..., :4]), images_in_memory(REAL)
    with pytest.raises(ValueError, match=r"`samples` must have the channels.*1 by 8 by 4 for 1 by 8 by 8"):
        evaluate(small, Reference(real), corner, ["copies"])
    with pytest.raises(ValueError, match="`held_out` must have the channels"):
        Evaluator(Reference(real, held_out=small), corner, ["copies"])
    with pytest.raises(ValueError, match=r"`copies_nearest` must be from 2 to the 50 images.*got 51"):
        Evaluator(Reference(real), corner, ["copies"], EvaluationSettings(copies_nearest=51))


def test_a_metric_does_not_depend_on_the_others(corner):
    samples, reference = images_in_memory(SAMPLES, labels=LABELS), Reference(images_in_memory(REAL))
    together = evaluate(samples, reference, corner, list(METRICS), SETTINGS)
    for name in METRICS:
        alone = evaluate(samples, reference, corner, [name], SETTINGS)
        assert alone.metrics == {name: pytest.approx(together.metrics[name], rel=1e-12)}


def test_the_reference_is_gone_through_once(corner):
    passes = []
    real = images_in_memory(REAL)

    def batches(size):
        passes.append(size)
        return real.batches(size)

    evaluator = Evaluator(Reference(replace(real, batches=batches)), corner, ["fid", "recall"], SETTINGS)
    first, second = (evaluator(images_in_memory(random_images(60, seed))) for seed in (0, 2))
    assert len(passes) == 1
    assert first.metrics["fid"] != second.metrics["fid"]
    expected = evaluate(images_in_memory(SAMPLES), Reference(real), corner, ["fid", "recall"], SETTINGS)
    assert first.metrics == expected.metrics
    assert evaluator.inputs(images_in_memory(SAMPLES)) == {
        name: getattr(first, name) for name in ("samples", "reference", "features", "settings")
    }


def test_cached_statistics_give_the_same_distances(corner, tmp_path):
    found = compute_statistics(images_in_memory(REAL), corner, batch_size=13)
    save_statistics(tmp_path / "real.npz", found.pooled, found.spatial, found.features)
    metrics = ["fid", "fid_infinity", "sfid"]
    cached, computed = (
        evaluate(images_in_memory(SAMPLES), reference, corner, metrics, SETTINGS)
        for reference in (open_reference(tmp_path / "real.npz"), Reference(images_in_memory(REAL)))
    )
    assert cached.metrics == pytest.approx(computed.metrics, rel=1e-9)
    assert cached.reference["statistics"] == {"source": str(tmp_path / "real.npz"), "num_images": 50}


def test_statistics_in_a_file_of_images_are_what_fid_uses(corner, tmp_path):
    """As guided-diffusion's reference batches: statistics of all real images beside some of the images."""
    whole = feature_statistics(Corner()(random_images(500, 2)).pooled)
    np.savez(tmp_path / "batch.npz", arr_0=REAL.permute(0, 2, 3, 1).numpy(), mu=whole.mean, sigma=whole.covariance)
    report = evaluate(
        images_in_memory(SAMPLES), open_reference(tmp_path / "batch.npz"), corner, ["fid", "recall"], SETTINGS
    )
    fake, real = Corner()(SAMPLES).pooled, Corner()(REAL).pooled
    assert report.metrics["fid"] == pytest.approx(frechet_distance(*feature_statistics(fake)[:2], *whole[:2]))
    assert report.metrics["recall"] == precision_recall(real, fake).recall


def test_report_says_what_was_measured(corner, tmp_path):
    report = evaluate(
        images_in_memory(SAMPLES[:15], "drawn"), Reference(images_in_memory(REAL)), corner, ["fid", "is"], SETTINGS
    )
    report.write(tmp_path / "new" / "report.json")
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written["metrics"] == report.metrics
    assert written["samples"] == {"source": "drawn", "num_images": 15, "shape": [1, 8, 8]}
    assert written["features"] == {**corner.provenance, "width": 4}
    assert written["settings"]["seed"] == 3
    assert {"python", "hfdiff", "torch"} <= set(written["versions"])
    assert "15 images are few" in written["warnings"][0]
    assert read_report(tmp_path / "new" / "report.json") == report
    markdown = report.to_markdown()
    assert f"| fid | {report.metrics['fid']:.6g} |" in markdown
    assert "15 images are few" in markdown
    assert corner.provenance["weights_sha256"] in markdown
    with pytest.raises(ValueError, match=r"\.json or \.md"):
        report.write(tmp_path / "report.txt")


def test_extrapolation_stands_beside_the_distance_of_few_images(corner):
    """Four features: below 20 images, and down to the 10 that can be extrapolated from."""
    for count, expected in [(9, ["fid", "is"]), (19, ["fid", "fid_infinity", "is"]), (20, ["fid", "is"])]:
        samples, reference = images_in_memory(SAMPLES[:count]), Reference(images_in_memory(REAL))
        report = evaluate(samples, reference, corner, ["fid", "is"], SETTINGS)
        assert list(report.metrics) == expected
        assert len(report.warnings) == (count < 20) + (report.metrics.get("fid_infinity", 0) is None)
    asked = evaluate(images_in_memory(SAMPLES[:19]), reference, corner, ["fid_infinity", "fid"], SETTINGS)
    assert list(asked.metrics) == ["fid_infinity", "fid"]


def test_a_distance_below_zero_is_not_told(corner):
    """The same images twice: their distance is 0, and the unbiased estimate of it falls on either side."""
    reference = Reference(images_in_memory(SAMPLES[:12]))
    samples = images_in_memory(SAMPLES[:12])
    settings = [replace(SETTINGS, seed=seed) for seed in range(4)]
    told = [evaluate(samples, reference, corner, ["fid_infinity"], each) for each in settings]
    below = [report for report in told if report.metrics["fid_infinity"] is None]
    assert below
    assert "fid_infinity  not estimated" in below[0].to_table()
    assert any("not estimated, since the line" in warning for warning in below[0].warnings)
    assert json.loads(below[0].to_json())["metrics"] == {"fid_infinity": None}


def test_samples_sorted_by_class_and_other_sizes_are_warned_of():
    class Class(nn.Module):
        def forward(self, images):
            pixels = images.flatten(1)
            return ImageFeatures(pixels[:, :1], nn.functional.one_hot(pixels[:, 0].long(), 3).double())

    sorted_images = torch.arange(3, dtype=torch.uint8).repeat_interleave(30)[:, None, None, None].expand(-1, 1, 8, 8)
    large = images_in_memory(torch.zeros(90, 1, 9, 8, dtype=torch.uint8))
    report = evaluate(
        images_in_memory(sorted_images), Reference(large), ModuleFeatures(Class(), "class"), ["is", "fid"], SETTINGS
    )
    assert report.metrics["is"] == pytest.approx(1)
    assert [text.split()[0] for text in report.warnings] == ["samples", "is:"]
    assert "8 by 8 pixels and the reference 9 by 8" in report.warnings[0]


@pytest.mark.parametrize(
    ("metrics", "reference", "network", "message"),
    [
        (["fad"], Reference(images_in_memory(REAL)), Corner(), "`metrics` must be some of fid, .*got fad"),
        ([], Reference(images_in_memory(REAL)), Corner(), "got none"),
        (["fid"], Reference(), Corner(), "`reference` must have images or their statistics for fid"),
        (["kid"], Reference(), Corner(), "`reference` must have images for kid, got none"),
        (["is"], Reference(), NoClasses(), "class probabilities for is, got none from 'net'"),
        (["sfid"], Reference(images_in_memory(REAL)), NoClasses(), "spatial features for sfid"),
        (["accuracy"], Reference(), Corner(), "`samples` must have labels for accuracy, got none"),
        (["fid"], Reference(images_in_memory(REAL)), NoClasses(), "finite.*NaN"),
    ],
)
def test_what_does_not_fit_is_refused(metrics, reference, network, message):
    samples = images_in_memory(random_images(60, 0, least=1))
    reference = reference if reference.images is None else Reference(images_in_memory(torch.zeros_like(REAL)))
    with pytest.raises(ValueError, match=message):
        evaluate(samples, reference, ModuleFeatures(network, "net"), metrics, SETTINGS)


def test_statistics_of_other_features_are_refused_before_the_images_are_read(corner, tmp_path):
    def refuse(message, metric="fid"):
        with pytest.raises(ValueError, match=message):
            evaluate(images_in_memory(SAMPLES), open_reference(tmp_path / "real.npz"), corner, [metric], SETTINGS)

    wide, right = feature_statistics(torch.randn(9, 5)), feature_statistics(torch.randn(9, 4))
    save_statistics(tmp_path / "real.npz", wide)
    refuse("a width of 5 for 4")
    save_statistics(tmp_path / "real.npz", right)
    refuse("must have mu_s", "sfid")
    refuse("only their statistics", "recall")
    save_statistics(tmp_path / "real.npz", right, right)
    refuse("a spatial width of 4 for 5", "sfid")
    save_statistics(tmp_path / "real.npz", right, features={**corner.provenance, "weights_sha256": "0123"})
    refuse("weights_sha256 of 0123")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`nearest` must be at least 1"):
        EvaluationSettings(nearest=0)
    with pytest.raises(ValueError, match="`seed` must be at least 0"):
        EvaluationSettings(seed=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier, samples as an npz file and real images as a folder."""
    path = tmp_path_factory.mktemp("evaluate")
    make_judge().save_pretrained(path / "classifier")
    np.savez(path / "samples.npz", SAMPLES.permute(0, 2, 3, 1).numpy(), LABELS.numpy())
    (path / "real").mkdir()
    for index, image in enumerate(REAL):
        Image.fromarray(image[0].numpy()).save(path / "real" / f"{index:02d}.png")
    return path


def run(folder, *arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    common = ["evaluate", "--features", f"classifier:{folder / 'classifier'}"]
    args = parser.parse_args([*common, *map(str, arguments)])
    args.run(args)


def test_command_prints_a_table_and_writes_the_report(folder, tmp_path, capsys):
    inputs = ("--samples", folder / "samples.npz", "--reference", folder / "real")
    run(folder, *inputs, "--metrics", ",".join(METRICS), "--output", tmp_path / "report.json")
    printed = capsys.readouterr()
    *table, last = printed.out.splitlines()
    assert [line.split()[0] for line in table] == list(METRICS)
    assert last == f"{tmp_path / 'report.json'}: the report"
    assert "images are few" in printed.err
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["reference"] == {"source": str(folder / "real"), "num_images": 50}
    assert len(written["features"]["weights_sha256"]) == 64


def test_command_draws_the_nearest_neighbours_without_a_network(folder, tmp_path, capsys):
    """Twelve samples of which two are copies: the picture shows eight rows, those two first."""
    samples = SAMPLES[:12].clone()
    samples[[3, 7]] = REAL[[10, 20]]
    np.savez(tmp_path / "samples.npz", samples.permute(0, 2, 3, 1).numpy())
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    inputs = [
        "--samples",
        tmp_path / "samples.npz",
        "--reference",
        folder / "real",
        "--held_out",
        folder / "samples.npz",
    ]
    picture = tmp_path / "new" / "grid.png"
    args = parser.parse_args(["evaluate", *map(str, inputs), "--metrics", "copies", "--neighbours", str(picture)])
    args.run(args)
    table, last = capsys.readouterr().out.splitlines()
    assert table == "copies  0.166667 (held_out 0, threshold 0.5)"
    assert last == f"{picture}: the samples nearest to training images, by copies"
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    height = (pixels.shape[0] - TOP) / 8
    labels = [pixels[int(TOP + row * height) : int(TOP + (row + 1) * height), :LEFT] for row in range(8)]
    assert [bool((label[..., 0] - label[..., 2] > 60).any()) for label in labels] == [True] * 2 + [False] * 6
    side, below = CELL + GAP, TOP + CELL // 2
    first, nearest = (pixels[below, LEFT + start : LEFT + start + CELL] for start in (0, side + APART))
    assert np.abs(first - nearest).mean() < 10  # drawn in other places of the raster
    assert np.abs(first - pixels[below, LEFT + 2 * side + APART :][:CELL]).mean() > 30


def test_command_keeps_statistics_for_the_next_time(folder, tmp_path, capsys):
    statistics, samples = tmp_path / "real.npz", folder / "samples.npz"
    run(folder, "--reference", folder / "real", "--save_statistics", statistics)
    run(folder, "--samples", samples, "--reference", statistics, "--metrics", "fid,sfid")
    run(folder, "--samples", samples, "--reference", folder / "real", "--metrics", "fid,sfid")
    first, *tables = capsys.readouterr().out.splitlines()
    assert first == f"{statistics}: statistics of 50 images"
    assert tables[:2] == tables[2:]


def test_command_refuses_bad_input_without_a_number(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    real, samples = ("--reference", folder / "real"), ("--samples", folder / "samples.npz")
    for arguments, message in [
        (("--samples", tmp_path / "empty", *real), "at least 2 images"),
        (real, "`samples`"),
        ((*samples, *real, "--output", "report.txt"), "json or .md"),
        ((*samples, *real, "--batch_size", 0), "batch_size"),
        ((*real, "--save_statistics", "real.pt"), "npz"),
        ((*samples, "--save_statistics", "real.npz"), "`reference`"),
        ((*samples, *real, "--held_out", folder / "real"), "`held_out` is for copies"),
        ((*samples, *real, "--neighbours", "grid.png"), "`neighbours` must end in .png and needs --metrics copies"),
        ((*samples, *real, "--metrics", "copies", "--neighbours", "grid.txt"), "`neighbours` must end in .png"),
        ((*samples, *real, "--metrics", "copies", "--copies_threshold", 1.5), "`copies_threshold` must be at most 1"),
        ((*samples, *real, "--metrics", "copies", "--copies_nearest", 1), "`copies_nearest` must be at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(folder, *arguments)
    assert capsys.readouterr().out == ""
