"""Drawn sets in files: the same bytes from any number of processes and after any stop."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from command_processes import start
from tiny_models import make_judge, make_pipeline
from tiny_training import finish, kill

from hfdiff.data.image_source import open_images
from hfdiff.sampling.opening import open_pipeline
from hfdiff.sampling.sample_files import draw_samples
from hfdiff.sampling.sampler import Sampler
from hfdiff.sampling.settings import SamplingSettings

ALONE = SimpleNamespace(
    is_main_process=True, process_index=0, num_processes=1, device="cpu", wait_for_everyone=lambda: None
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, a judge and real images."""
    path = tmp_path_factory.mktemp("set")
    make_pipeline().save_pretrained(path / "pipeline")
    make_judge().save_pretrained(path / "judge")
    real = np.random.default_rng(0).integers(256, size=(60, 8, 8, 1), dtype=np.uint8)
    np.savez(path / "real.npz", real)
    return path


@pytest.fixture(scope="module")
def opened(folder):
    return open_pipeline(str(folder / "pipeline"))


def sampler(opened, **changes):
    small = {"num_images": 7, "num_inference_steps": 2, "sampling_batch_size": 3}
    return Sampler(opened, SamplingSettings(**{**small, **changes}))


def evaluate(folder, samples_dir, *arguments, steps=2):
    """The command line of an evaluation of 20 images in 7 batches."""
    return [
        *("evaluate", "--samples", folder / "pipeline", "--reference", folder / "real.npz"),
        *("--features", f"classifier:{folder / 'judge'}", "--metrics", "fid,is,kid,precision,recall,accuracy"),
        *("--num_images", 20, "--sampling_batch_size", 3, "--num_inference_steps", steps, "--samples_dir", samples_dir),
        *arguments,
    ]


def test_the_file_is_as_guided_diffusion_writes_it(opened, tmp_path):
    drawn = sampler(opened)
    path = draw_samples(drawn, tmp_path / "new" / "set", ALONE)
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], np.concatenate([drawn.draw(batch) for batch in range(3)]))
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    source = open_images(path)
    assert (source.count, source.shape, source.provenance) == (7, (1, 8, 8), drawn.provenance)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sorted(file.name for file in path.parent.iterdir()) == ["run.json", "samples.npz"]


def test_only_what_is_missing_is_drawn(opened, tmp_path, monkeypatch):
    calls = []
    draw = Sampler.draw

    def stop_at_batch_1(self, batch):
        calls.append(batch)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return draw(self, batch)

    monkeypatch.setattr(Sampler, "draw", stop_at_batch_1)
    with pytest.raises(KeyboardInterrupt):
        draw_samples(sampler(opened), tmp_path / "stopped", ALONE)
    stopped = draw_samples(sampler(opened), tmp_path / "stopped", ALONE)
    assert calls == [0, 1, 1, 2]
    draw_samples(sampler(opened), tmp_path / "stopped", ALONE)
    assert len(calls) == 4
    whole = draw_samples(sampler(opened), tmp_path / "whole", ALONE)
    assert stopped.read_bytes() == whole.read_bytes()


def test_other_folders_are_refused(opened, tmp_path):
    draw_samples(sampler(opened), tmp_path / "set", ALONE)
    for changes, message in [
        ({"num_images": 8}, "holds other samples: `num_images` was 7, is 8; name another folder"),
        ({"seed": 1}, "`seed` was 0, is 1"),
        ({"scheduler": "DDIM"}, "`scheduler` was 'hfdiff.DDPMScheduler', is 'diffusers.DDIMScheduler'"),
        ({"guidance_scale": 1.0, "label_policy": "random"}, "`guidance_scale` was .*`label_policy` was"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw_samples(sampler(opened, **changes), tmp_path / "set", ALONE)
    retrained = Sampler(replace(opened, sha256="0123"), sampler(opened).settings)
    with pytest.raises(ValueError, match="`pipeline_sha256` was"):
        draw_samples(retrained, tmp_path / "set", ALONE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"holds files but no run\.json"):
        draw_samples(sampler(opened), tmp_path / "mine", ALONE)


def test_broken_shards_are_named(opened, tmp_path):
    path = draw_samples(sampler(opened), tmp_path, ALONE)
    path.unlink()
    shards = [tmp_path / f"shard-{batch:05d}.npy" for batch in range(3)]
    for batch, shard in enumerate(shards):
        np.save(shard, sampler(opened).draw(batch))
    shards[1].write_bytes(shards[1].read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"shard-00001\.npy.*remove it"):
        draw_samples(sampler(opened), tmp_path, ALONE)
    np.save(shards[1], np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="do not make 7 images"):
        draw_samples(sampler(opened), tmp_path, ALONE)
    assert not path.exists()


def test_one_two_and_three_processes_give_the_same_bytes_and_metrics(folder, tmp_path):
    runs = {count: tmp_path / str(count) for count in (1, 2, 3)}
    workers = []
    for count, run in runs.items():
        workers += start(run, evaluate(folder, run / "set", "--output", run / "report.json"), count)
    assert finish(workers) == [0] * 6
    samples = {(run / "set" / "samples.npz").read_bytes() for run in runs.values()}
    assert len(samples) == 1
    metrics = [json.loads((run / "report.json").read_text())["metrics"] for run in runs.values()]
    assert metrics[0] == metrics[1] == metrics[2]
    images = np.load(runs[3] / "set" / "samples.npz")["arr_0"]
    assert len({image.tobytes() for image in images}) == len(images) == 20
    assert (runs[3] / "output-0").read_text().count("accuracy") == 1
    assert "accuracy" not in (runs[3] / "output-1").read_text()  # one voice


def test_killed_processes_go_on_where_they_were(folder, tmp_path):
    command = evaluate(folder, tmp_path / "set", steps=10)
    workers = start(tmp_path / "killed", command, processes=2)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "set").glob("shard-*.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(workers)
    assert not (tmp_path / "set" / "samples.npz").exists()
    left = {shard: shard.stat().st_mtime_ns for shard in (tmp_path / "set").glob("shard-*.npy")}
    assert left
    whole = evaluate(folder, tmp_path / "whole", steps=10)
    assert finish([*start(tmp_path / "again", command), *start(tmp_path / "other", whole)]) == [0, 0]
    ours, theirs = (tmp_path / name / "samples.npz" for name in ("set", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["run.json", "samples.npz"]


def test_what_all_processes_find_is_told_once(folder, tmp_path):
    workers = start(tmp_path, [*evaluate(folder, tmp_path / "set"), "--scheduler", "Magic"], processes=2)
    assert 0 not in finish(workers)
    told = [(tmp_path / f"output-{rank}").read_text() for rank in (0, 1)]
    assert told[0].count("must be a scheduler of diffusers") == 1
    assert "Traceback" not in told[0] + told[1]
    assert "must be" not in told[1]
