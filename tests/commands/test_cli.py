import contextlib
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_judge, make_pipeline

from hfdiff import AnnealedLangevinScheduler, NCSNPipeline, NCSNv2Model, cli
from hfdiff.commands.flags import check_path
from hfdiff.data.pictures import image_grid, to_bytes
from hfdiff.sampling import scheduler_class


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(path)
    return str(path)


def sample(folder, output, *arguments):
    return cli.main(["sample", "--pipeline", folder, "--steps", "3", "--output", str(output), *arguments])


def test_npz_is_as_guided_diffusion_writes_it(folder, tmp_path):
    assert sample(folder, tmp_path / "samples.npz", "--labels", "0", "fox", "--num", "2") == 0
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays["arr_0"].shape == (4, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [0, 0, 2, 2]


def test_grid_and_folder_hold_the_same_images(folder, tmp_path):
    arguments = ("--labels", "1", "2", "--seed", "5", "--scale", "3")
    for output in ("samples.npz", "grid.png", "folder"):
        assert sample(folder, tmp_path / output, *arguments) == 0
    images = np.load(tmp_path / "samples.npz")["arr_0"][..., 0]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    np.testing.assert_array_equal(grid[:, :8], images[0])
    np.testing.assert_array_equal(grid[:, -8:], images[1])
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == ["00000_1.png", "00001_2.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(files[1])), images[1])


def test_both_vocabularies_draw_the_same(folder, tmp_path):
    long = ["--class_labels", "0", "--num_images", "2", "--guidance_scale", "3", "--num_inference_steps", "2"]
    short = ["--labels", "0", "--num", "2", "--scale", "3", "--steps", "2"]
    for name, flags in (("long", long), ("short", short)):
        assert cli.main(["sample", "--pipeline", folder, "--output", str(tmp_path / f"{name}.npz"), *flags]) == 0
    first, second = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("long", "short"))
    np.testing.assert_array_equal(first, second)


def test_image_i_of_a_seed_is_the_same_picture_in_every_command(folder, tmp_path, capsys):
    """Rounding aside, which may differ by a level: sets to be measured are drawn on one thread."""
    make_judge().save_pretrained(tmp_path / "judge")
    assert sample(folder, tmp_path / "sampled.npz", "--num_images", "4", "--seed", "7") == 0
    evaluate = ["evaluate", "--samples", folder, "--num_images", "4", "--num_inference_steps", "3", "--seed", "7"]
    evaluate += ["--samples_dir", str(tmp_path / "drawn"), "--features", f"classifier:{tmp_path / 'judge'}"]
    assert cli.main([*evaluate, "--metrics", "is"]) == 0
    sampled, drawn = (np.load(tmp_path / name) for name in ("sampled.npz", "drawn/samples.npz"))
    assert sampled["arr_1"].tolist() == drawn["arr_1"].tolist() == [0, 1, 2, 0]
    assert np.abs(sampled["arr_0"].astype(int) - drawn["arr_0"]).max() <= 1


def test_what_may_be_a_hub_id_is_left_to_the_hub(tmp_path, monkeypatch):
    """Also in a clone, where the folder `hfdiff` is the package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hfdiff").mkdir()
    (tmp_path / "out").mkdir()
    for name in (None, "hfdiff/mnist-ncsn", "user/name", "out"):
        check_path("pipeline", name)
    for name in ("out/typo", "typo.npz", "a/b/c", "./typo"):
        with pytest.raises(ValueError, match="`pipeline` must be there, got"):
            check_path("pipeline", name)


def test_one_image_of_each_class_by_default(folder, tmp_path, capsys):
    assert sample(folder, tmp_path / "samples.npz") == 0
    assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == [0, 1, 2]
    assert capsys.readouterr().out == f"{tmp_path / 'samples.npz'}: 3 images of cat, dog, fox\n"


def test_scheduler_is_swapped(folder, tmp_path):
    for name in ("DDIM", "DDIMScheduler"):
        assert sample(folder, tmp_path / f"{name}.npz", "--labels", "0", "--scheduler", name) == 0
    assert scheduler_class("DDIM") is diffusers.DDIMScheduler


def test_a_pipeline_without_classes_draws_as_many_as_asked_for(tmp_path, capsys):
    torch.manual_seed(0)
    model = NCSNv2Model(8, 1, 8, num_levels=4, sigma_max=1.0)
    NCSNPipeline(model, AnnealedLangevinScheduler(4, 0.01, 1.0, steps_per_level=1)).save_pretrained(tmp_path / "ncsn")
    assert sample(str(tmp_path / "ncsn"), tmp_path / "samples.npz", "--num", "3") == 0
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays.files == ["arr_0"]
    assert sample(str(tmp_path / "ncsn"), tmp_path / "folder", "--num", "3") == 0
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(files[2])), arrays["arr_0"][2, ..., 0])
    assert sample(str(tmp_path / "ncsn"), tmp_path / "grid.png", "--labels", "3") == 2
    assert "`--labels` must be left out for a NCSNPipeline without classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "wolf"], "`--labels` must be class indices or names among ['cat', 'dog', 'fox'], got 'wolf'"),
        (["--class_labels", "7"], "`--class_labels` must be between 0"),
        (["--labels", "0", "--scheduler", "Magic"], "`--scheduler` must be a scheduler of diffusers"),
        (["--labels", "0", "--num", "0"], "`--num` must be at least 1, got 0"),
        (["--labels", "0", "--num_images=0"], "`--num_images` must be at least 1, got 0"),
        (["--labels", "0", "--scale", "-1"], "`--scale` must be finite and at least 0"),
        (["--labels", "0", "--steps", "0"], "`--steps` must be at least 1"),
        (["--pipeline", "nowhere/at/all"], "`--pipeline` must be there, got 'nowhere/at/all'"),
    ],
)
def test_a_message_names_the_flag_that_was_typed(folder, tmp_path, capsys, arguments, message):
    assert sample(folder, tmp_path / "grid.png", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_has_an_example_of_each_command(capsys, arguments):
    with contextlib.suppress(SystemExit):
        assert cli.main(arguments) == 0
    listed = capsys.readouterr().out
    for command in ("demo", "sample", "train", "evaluate", "sweep", "bits-per-dim", "push", "push-space"):
        assert re.search(rf"^  hfdiff {command}\b", listed, flags=re.MULTILINE), command


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["sample", "--steps", "0"],
        ["evaluate", "--samples", "out/typo.npz", "--features", "inception"],
        ["evaluate", "--samples", ".", "--features", "inception", "--metrics", "fid"],
        ["sweep", "--pipeline", "a/b/c", "--guidance_scales", "1", "--reference", ".", "--features", "inception"],
        ["bits-per-dim", "--pipeline", "a/b/c"],
        ["push", "a/b/c", "user/name"],
    ],
)
def test_arguments_are_checked_before_torch_is_imported(arguments):
    """The imports take seconds, which nobody should wait for to read of a typing error."""
    code = f"import sys; from hfdiff import cli; cli.main({arguments!r})"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "Traceback" not in done.stderr


def test_grid_places_images_row_by_row():
    pictures = [Image.new("L", (3, 2), color=value) for value in (10, 20, 30)]
    grid = np.asarray(image_grid(pictures, columns=2, gap=1))
    assert grid.shape == (5, 7)
    assert (grid[:2, :3] == 10).all()
    assert (grid[:2, 4:] == 20).all()
    assert (grid[3:, :3] == 30).all()
    assert np.asarray(image_grid(pictures, columns=3, scale=2)).shape == (4, 26)


def test_bytes_are_rounded():
    assert to_bytes(np.array([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0])).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train", "ddpm", "--train_data_dir", "nosuch"], "`train_data_dir` must be a folder, got 'nosuch'"),
        (
            ["train", "classifier", "--diffusion_model", "out/nosuch"],
            "`diffusion_model` must be there, got 'out/nosuch'",
        ),
        (["train", "classifier", "--judge", "./nosuch"], "`judge` must be there"),
        (["sample", "--pipeline", "out/digits-guidde"], "`--pipeline` must be there"),
        (["sample", "--output", "out/images.txt"], "`--output` must be a folder or end in one of .png"),
        (["sample", "--output", "a_file/images.png"], "`--output` must be where files can be written"),
        (["demo", "--output", "a_file/images.png"], "`--output` must be where files can be written"),
        (["bits-per-dim", "--pipeline", ".", "--output", "a_file/b"], "`--output` must be where files can be written"),
        (
            [
                "sweep",
                "--pipeline",
                ".",
                "--reference",
                ".",
                "--scales",
                "1",
                "--features",
                "classifier:.",
                "--num_images",
                "1",
                "--output_dir",
                "a_file/s",
            ],
            "`--output_dir` must be where files can be written",
        ),
        (
            [
                "evaluate",
                "--samples",
                ".",
                "--reference",
                ".",
                "--features",
                "classifier:.",
                "--output",
                "a_file/r.json",
            ],
            "`--output` must be where files can be written",
        ),
    ],
)
def test_a_mistyped_path_is_told_before_anything_is_imported_or_drawn(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    with contextlib.suppress(SystemExit):
        assert cli.main(flags) == 2
    assert message in capsys.readouterr().err
