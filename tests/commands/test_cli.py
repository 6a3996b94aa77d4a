import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_pipeline

from hfdiff import AnnealedLangevinScheduler, NCSNPipeline, NCSNv2Model, cli
from hfdiff.data.pictures import image_grid, to_bytes


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


def test_images_do_not_depend_on_the_batch_size(folder, tmp_path, monkeypatch):
    for size in (2, 100):
        monkeypatch.setattr(cli, "BATCH_SIZE", size)
        assert sample(folder, tmp_path / f"{size}.npz", "--labels", "0", "1", "2", "--num", "2") == 0
    small, large = (np.load(tmp_path / f"{size}.npz")["arr_0"].astype(int) for size in (2, 100))
    assert np.abs(small - large).max() <= 1  # sums of another order round differently


def test_scheduler_is_swapped(folder, tmp_path):
    for name in ("DDIM", "DDIMScheduler"):
        assert sample(folder, tmp_path / f"{name}.npz", "--labels", "0", "--scheduler", name) == 0
    assert cli.scheduler_class("DDIM") is diffusers.DDIMScheduler


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
    assert "--labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--labels"),
        (["--labels", "wolf"], "class_labels"),
        (["--labels", "7"], "class_labels"),
        (["--labels", "0", "--scheduler", "Magic"], "--scheduler"),
        (["--labels", "0", "--num", "0"], "--num"),
        (["--labels", "0", "--scale", "-1"], "guidance_scale"),
    ],
)
def test_bad_arguments_end_with_a_message(folder, tmp_path, capsys, arguments, message):
    assert sample(folder, tmp_path / "grid.png", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    assert "sample" in listed
    assert "demo" in listed


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
