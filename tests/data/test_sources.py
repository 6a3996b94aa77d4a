import io

import datasets
import httpx2
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hfdiff.data.image_source import images_in_memory, open_images
from hfdiff.data.sources import open_dataset


@pytest.fixture
def pixels():
    """Seven images of 4×6 pixels in colour, (N, H, W, C)."""
    return np.random.default_rng(0).integers(256, size=(7, 4, 6, 3), dtype=np.uint8)


def write_folder(folder, pixels, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, array in enumerate(pixels):
        Image.fromarray(array.squeeze()).save(folder / f"{index:03d}{suffix}")
    return folder


def read(source, batch_size=3):
    batches = list(source.batches(batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


def test_folder_and_npz_give_the_stored_bytes(pixels, tmp_path):
    np.savez(tmp_path / "plain.npz", pixels, np.arange(7))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pixels)
    for name in ("folder", "plain.npz", "packed.npz"):
        source = open_images(write_folder(tmp_path / name, pixels) if name == "folder" else tmp_path / name)
        assert (source.count, source.shape) == (7, (3, 4, 6))
        for size in (3, 100):
            np.testing.assert_array_equal(read(source, size), pixels)


def test_labels_of_npz_files(pixels, tmp_path):
    """Integers, one per image; other second arrays are not labels."""
    for labels, expected in [
        (np.arange(7, dtype=np.int32), list(range(7))),
        (np.arange(7.0), None),
        (np.arange(6), None),
        (np.zeros((7, 2), int), None),
    ]:
        np.savez(tmp_path / "images.npz", pixels, labels)
        found = open_images(tmp_path / "images.npz").labels
        assert (None if found is None else found.tolist()) == expected


def test_grey_images(pixels, tmp_path):
    grey = pixels[..., :1]
    np.savez(tmp_path / "grey.npz", grey)
    for source in (open_images(tmp_path / "grey.npz"), open_images(write_folder(tmp_path / "grey", grey))):
        assert source.shape == (1, 4, 6)
        np.testing.assert_array_equal(read(source), grey)


def test_folders_are_gone_through_with_their_subfolders_in_order(pixels, tmp_path):
    write_folder(tmp_path / "b", pixels[4:])
    write_folder(tmp_path / "a", pixels[:4])
    np.testing.assert_array_equal(read(open_images(tmp_path)), pixels)


def test_a_grey_image_among_colours_is_repeated(pixels, tmp_path):
    folder = write_folder(tmp_path / "mixed", pixels)
    Image.fromarray(pixels[0, ..., 0]).save(folder / "000.png")
    assert open_images(folder).shape == (3, 4, 6)
    np.testing.assert_array_equal(read(open_images(folder))[0], pixels[0, ..., :1].repeat(3, axis=-1))


def test_parquet(tmp_path):
    pytest.importorskip("jsonargparse")
    squares = np.random.default_rng(0).integers(256, size=(5, 4, 4, 3), dtype=np.uint8)
    files = []
    for array in squares:
        Image.fromarray(array).save(stream := io.BytesIO(), "PNG")
        files.append({"bytes": stream.getvalue(), "path": None})
    Dataset.from_dict({"image": files}).to_parquet(tmp_path / "images.parquet")
    np.testing.assert_array_equal(read(open_images(tmp_path / "images.parquet")), squares)


def test_images_in_memory(pixels):
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(read(images_in_memory(images)), pixels)
    for wrong in (images.float(), images[0], images[:, :2]):
        with pytest.raises(ValueError, match="uint8"):
            images_in_memory(wrong)


def test_folders_that_do_not_fit_are_refused(pixels, tmp_path):
    folder = write_folder(tmp_path / "images", pixels[:1])
    for path, message in ((folder, "at least 2 images.*got 1"), (folder / "empty", "at least 2 images.*got 0")):
        path.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            open_images(path)
    write_folder(folder, pixels)
    Image.fromarray(pixels[0, :, :5]).save(folder / "004.png")
    with pytest.raises(ValueError, match=r"one size.*6 by 4.*000\.png.*5 by 4.*004\.png"):
        open_images(folder)
    Image.fromarray(pixels[0]).convert("RGBA").save(folder / "004.png")
    with pytest.raises(ValueError, match=r"004\.png.*RGBA"):
        open_images(folder)


def test_broken_files_are_named(pixels, tmp_path):
    folder = write_folder(tmp_path / "images", np.repeat(np.repeat(pixels, 8, axis=1), 8, axis=2))
    content = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"003\.png.*cannot be read"):
        read(open_images(folder))
    (folder / "003.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"003\.png.*cannot be read"):
        open_images(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((3, 4, 4, 3), np.uint8)}, "arr_0"),
        ({"arr_0": np.zeros((3, 4, 4, 3), np.float32)}, "uint8.*to_bytes"),
        ({"arr_0": np.zeros((3, 3, 4, 4), np.uint8)}, "1 or 3 channels"),
        ({"arr_0": np.zeros((3, 4, 4), np.uint8)}, "1 or 3 channels"),
        ({"arr_0": np.zeros((1, 4, 4, 3), np.uint8)}, "at least 2"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "other.npz")


def test_broken_npz_files_are_refused(pixels, tmp_path):
    path = tmp_path / "images.npz"
    with pytest.raises(ValueError, match=r"images\.npz"):
        open_images(path)
    np.savez(path, pixels)
    content = bytearray(path.read_bytes())
    content[300] ^= 1  # a bit of the pixels: the archive's checksum finds it
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.npz.*cannot be read"):
        read(open_images(path))
    path.write_bytes(content[:400])
    with pytest.raises(ValueError, match=r"images\.npz.*cannot be read"):
        open_images(path)


@pytest.mark.parametrize(("offline", "reason"), [(False, "The connection to the Hub"), (True, "the cache lacks it")])
def test_a_dataset_of_a_hub_that_does_not_answer_is_refused_at_once(monkeypatch, offline, reason):
    """Not after the half a minute that `load_dataset` tries for, and not as a wrong name."""
    asked = []

    def refuse(self, name, **options):
        asked.append(name)
        raise httpx2.ConnectError("Name or service not known")

    def load(source, config_name, split):
        assert datasets.config.HF_HUB_OFFLINE
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("hfdiff.data.sources.load_dataset", load)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    with pytest.raises(ValueError, match=f"dataset 'nobody/nothing' cannot be had: {reason}"):
        open_dataset("nobody/nothing", "train")
    assert asked == ([] if offline else ["nobody/nothing"])
    assert datasets.config.HF_HUB_OFFLINE is offline
