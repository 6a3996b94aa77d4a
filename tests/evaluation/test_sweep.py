"""Sweeps: the table and its best scale by hand, then the command on a tiny pipeline."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from command_processes import start
from PIL import Image
from tiny_models import make_judge, make_pipeline
from tiny_training import finish

from hfdiff import cli
from hfdiff.commands.sweep import plot
from hfdiff.evaluation.evaluate import Evaluator
from hfdiff.evaluation.sweep import SweepTable, sweep_points
from hfdiff.sampling.sampler import Sampler
from hfdiff.sampling.settings import SamplingSettings


def row(scheduler, scale, fid, accuracy):
    settings = {"scheduler": scheduler, "num_inference_steps": 50, "guidance_scale": scale, "num_images": 9}
    return {**settings, "fid": fid, "accuracy": accuracy}


ROWS = [
    row("hfdiff.DDPMScheduler", 4.0, 1.5, 0.9),
    row("hfdiff.DDPMScheduler", 0.0, 2.5, 0.1),
    row("hfdiff.DDPMScheduler", 8.0, 2.0, 1.0),
    row("diffusers.DDIMScheduler", 0.0, 3.0, 0.1),
    row("diffusers.DDIMScheduler", 8.0, 1.25, 0.95),
]


def test_points_are_all_combinations_with_the_scales_together():
    points = sweep_points(SamplingSettings(9, seed=3), [0, 4], [10, 20], [None, "DDIM"])
    found = [(point.scheduler, point.num_inference_steps, point.guidance_scale) for point in points]
    assert found[:4] == [(None, 10, 0), (None, 10, 4), (None, 20, 0), (None, 20, 4)]
    assert found[4:] == [("DDIM", *rest) for _, *rest in found[:4]]
    assert {(point.num_images, point.seed) for point in points} == {(9, 3)}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([], [5]), "`guidance_scales` must hold one or more different values"),
        (([1, 1.0], [5]), "`guidance_scales`"),
        (([1], [5, 5]), "`num_inference_steps`"),
        (([1], [5], ["DDIM", "DDIM"]), "`schedulers`"),
        (([-1], [5]), "`guidance_scale` must be finite and at least 0"),
        (([1], [0]), "`num_inference_steps` must be at least 1"),
    ],
)
def test_points_are_checked(lists, message):
    with pytest.raises(ValueError, match=message):
        sweep_points(SamplingSettings(9), *lists)


def test_the_best_point_is_that_of_the_first_metric():
    by_distance, by_accuracy = SweepTable(ROWS, ["fid", "accuracy"]), SweepTable(ROWS, ["accuracy", "fid"])
    assert by_distance.best() == ROWS[4]
    assert by_accuracy.best() == ROWS[2]
    assert by_distance.best_lines() == [
        "best guidance_scale of hfdiff.DDPMScheduler, 50 steps: 4, fid 1.5",
        "best guidance_scale of diffusers.DDIMScheduler, 50 steps: 8, fid 1.25, the best of all",
    ]
    ties = [row("a", 2.0, 1.0, 0), row("a", 1.0, 1.0, 0)]
    assert SweepTable(ties, ["fid"]).best() == ties[1]


def test_table_in_all_forms(tmp_path):
    table = SweepTable(ROWS, ["fid", "accuracy"])
    table.write(tmp_path)
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert lines[0] == "scheduler,num_inference_steps,guidance_scale,num_images,fid,accuracy"
    assert lines[1] == "hfdiff.DDPMScheduler,50,4.0,9,1.5,0.9"
    assert len(lines) == 6
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["points"] == ROWS
    assert written["best"] == {"metric": "fid", "point": ROWS[4], "of_each_curve": [ROWS[0], ROWS[4]]}
    markdown = (tmp_path / "sweep.md").read_text().splitlines()
    assert markdown[2] == "| hfdiff.DDPMScheduler | 50 | 4 | 9 | 1.5 | 0.9 |"
    assert [line for line in markdown if "**" in line] == [markdown[6]]
    assert "**1.25**" in markdown[6]


def test_plot_has_a_panel_per_metric_and_a_line_per_curve():
    figure = plot(SweepTable(ROWS, ["fid", "accuracy"]), "what was measured")
    assert [axes.get_title() for axes in figure.axes] == ["FID ↓", "accuracy ↑"]
    first, second, best = figure.axes[0].lines
    assert first.get_xydata().tolist() == [[0, 2.5], [4, 1.5], [8, 2]]
    assert second.get_xydata().tolist() == [[0, 3], [8, 1.25]]
    assert best.get_xydata().tolist() == [[8, 1.25]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["DDPM, 50 steps", "DDIM, 50 steps"]
    assert figure.get_suptitle() == "what was measured"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    make_pipeline().save_pretrained(path / "pipeline")
    make_judge().save_pretrained(path / "judge")
    np.savez(path / "real.npz", np.random.default_rng(0).integers(256, size=(40, 8, 8, 1), dtype=np.uint8))
    return SimpleNamespace(pipeline=path / "pipeline", judge=path / "judge", real=path / "real.npz")


def measuring(folder):
    return ["--reference", folder.real, "--features", f"classifier:{folder.judge}", "--num_images", 9]


def command(folder, output, *arguments):
    return [
        *("sweep", "--pipeline", folder.pipeline, *measuring(folder), "--sampling_batch_size", 5),
        *("--guidance_scales", 0, 1000, "--num_inference_steps", 2, "--schedulers", "DDPM", "DDIM"),
        *("--output_dir", output, *arguments),
    ]


def run(*arguments):
    return cli.main(list(map(str, arguments)))


def test_a_sweep_goes_on_where_it_was_stopped(folder, tmp_path, capsys, monkeypatch):
    draws, measured = [], []
    draw, measure = Sampler.draw, Evaluator.__call__

    def stop_at_third(self, batch):
        draws.append(batch)
        if len(draws) == 4:
            raise KeyboardInterrupt
        return draw(self, batch)

    monkeypatch.setattr(Sampler, "draw", stop_at_third)
    monkeypatch.setattr(Evaluator, "__call__", lambda self, source: measured.append(source) or measure(self, source))
    with pytest.raises(KeyboardInterrupt):
        run(*command(folder, tmp_path))
    assert run(*command(folder, tmp_path)) == 0
    assert (len(draws), len(measured)) == (8 + 1, 4)
    printed = capsys.readouterr().out
    assert "best guidance_scale of hfdiff.DDPMScheduler, 2 steps: " in printed
    assert printed.count("the best of all") == 1
    assert Image.open(tmp_path / "sweep.png").format == "PNG"
    first = (tmp_path / "sweep.csv").read_bytes()
    assert run(*command(folder, tmp_path)) == 0
    assert (len(draws), len(measured)) == (9, 4)
    assert (tmp_path / "sweep.csv").read_bytes() == first
    assert run(*command(folder, tmp_path, "--metrics", "recall,accuracy")) == 0
    assert (tmp_path / "sweep.csv").read_text().splitlines()[0].endswith(",num_images,recall,accuracy")
    assert (len(draws), len(measured)) == (9, 4)
    assert run(*command(folder, tmp_path, "--metrics", "accuracy", "--nearest", "2")) == 0
    assert (len(draws), len(measured)) == (9, 8)  # measured anew, not drawn
    assert run(*command(folder, tmp_path, "--seed", "1")) == 2
    assert "holds other samples: `--seed` was 0, is 1" in capsys.readouterr().err


def test_a_point_is_what_evaluate_says(folder, tmp_path):
    sweeping = start(tmp_path / "two", command(folder, tmp_path / "two" / "sweep"), processes=2)
    metrics = "fid,is,precision,recall,accuracy,worst_class_accuracy"
    evaluating = start(tmp_path / "one", [
        *("evaluate", "--samples", folder.pipeline, *measuring(folder), "--metrics", metrics),
        *("--sampling_batch_size", 5, "--guidance_scale", 1000, "--num_inference_steps", 2, "--scheduler", "DDIM"),
        *("--samples_dir", tmp_path / "one" / "set", "--output", tmp_path / "one" / "report.json"),
    ])  # fmt: skip
    assert finish([*sweeping, *evaluating]) == [0, 0, 0]
    place = tmp_path / "two" / "sweep"
    ours, theirs = (
        json.loads(path.read_text())
        for path in (place / "DDIM-steps-2-scale-1000" / "report.json", tmp_path / "one" / "report.json")
    )
    assert ours["samples"].pop("source") != theirs["samples"].pop("source")
    assert ours == theirs
    assert ours["samples"]["label_policy"] == "balanced"
    assert len(ours["features"]["weights_sha256"]) == len(ours["samples"]["pipeline_sha256"]) == 64
    with (place / "sweep.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert {name: float(last[name]) for name in metrics.split(",")} == ours["metrics"]


def test_settings_are_checked_before_anything_is_drawn(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "draw", lambda *_: pytest.fail("drawn"))
    for arguments, message in [
        (["--schedulers", "DDIM", "Magic"], "must be a scheduler of diffusers"),
        (["--class_labels", "wolf"], "`--class_labels` must be"),
        (["--metrics", "fid,fad"], "`--metrics` must be some of"),
        (["--features", "classifier:nowhere"], "`--features` must name"),
        (["--guidance_scales", "nan"], "`guidance_scale` must be finite"),
        (["--num_inference_steps", "2000"], "num_inference_steps"),
    ]:
        assert run(*command(folder, tmp_path, *arguments)) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
