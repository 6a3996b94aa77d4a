"""Where images come from, how they are decoded, cropped and augmented, and what a batch holds."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from hfdiff.data.image_source import images_in_memory, open_images
from hfdiff.data.images import ImageSet, gather, to_pixels
from hfdiff.data.labelled import LabelledImages, load_images
from hfdiff.training.augmentation import Augmentation, random_shift
from hfdiff.training.batches import BatchStream, choose_flips, load_training_data
from hfdiff.training.config import TrainingSettings
from hfdiff.training.settings import LabelSettings


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(picture: PILImage.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, format)
    return file.getvalue()


def noise_picture(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def write_parquet(path: Path, pictures: list, labels: list | None = None, label_type: object = None) -> str:
    """A parquet file of pictures, or of their bytes, with a column of labels."""
    path.parent.mkdir(exist_ok=True)
    labels = [i % 2 for i in range(len(pictures))] if labels is None else labels
    features = Features({"image": Image(), "label": label_type or ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": p if isinstance(p, bytes) else encode(p), "path": None} for p in pictures]
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(str(path))
    return str(path)


# --- batches ---------------------------------------------------------------------------------------------------------


def counted_images(count: int) -> LabelledImages:
    return LabelledImages(torch.arange(count).float().view(-1, 1, 1, 1), torch.arange(count), [])


def test_an_epoch_visits_every_image_once_and_the_next_in_another_order() -> None:
    stream = BatchStream(counted_images(20), 5, 10, seed=3)
    epochs = [torch.cat([stream(4 * epoch + i).labels for i in range(4)]) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_batch_is_a_function_of_its_number_and_the_seed() -> None:
    stream = BatchStream(counted_images(20), 5, 10, seed=3)
    later = stream(7)
    stream(0)
    for ours, again in zip(later[:4], stream(7)[:4], strict=True):
        assert torch.equal(ours, again)
    for other in (stream(8), BatchStream(counted_images(20), 5, 10, seed=4)(7)):
        assert not torch.equal(later.noise, other.noise)


def test_a_batch_larger_than_the_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train_batch_size.*4 images.*5"):
        BatchStream(counted_images(4), 5, 10, seed=0)


def test_balanced_batches_have_every_class_equally_often_and_every_image_of_it() -> None:
    labels = torch.tensor([0] * 12 + [1] * 3 + [3] * 5)  # class 2 has no images
    data = LabelledImages(torch.arange(20).float().view(-1, 1, 1, 1), labels, list("abcd"))
    stream = BatchStream(data, 4, 10, seed=3, balance_classes=True)
    batches = [stream(number) for number in range(12)]
    kinds = torch.cat([batch.labels for batch in batches])
    seen = torch.cat([batch.x0 for batch in batches]).flatten().long()
    assert torch.equal(labels[seen], kinds)
    for end in range(1, 49):
        counts = torch.bincount(kinds[:end], minlength=4)[[0, 1, 3]]
        assert counts.max() - counts.min() <= 1
    for members in (range(12), range(12, 15), range(15, 20)):  # each is seen 16 times, image by image
        often = torch.bincount(seen, minlength=20)[list(members)]
        assert often.sum() == 16
        assert often.max() - often.min() <= 1


def test_a_balanced_batch_is_a_function_of_its_number() -> None:
    data = counted_images(20)._replace(labels=torch.arange(20) // 7)
    first, second = (BatchStream(data, 5, 10, seed=3, balance_classes=True) for _ in range(2))
    forwards = [first(number).x0 for number in range(9)]
    for number in reversed(range(9)):
        assert torch.equal(second(number).x0, forwards[number])
    assert not torch.equal(forwards[0], BatchStream(data, 5, 10, seed=4, balance_classes=True)(0).x0)


def test_images_kept_and_images_decoded_for_each_batch_give_the_same_bits(tmp_path: Path) -> None:
    sizes = [(9, 9), (9, 14), (13, 9), (20, 20)]
    pictures = [noise_picture(sizes[i % 4], i, "L" if i % 3 == 0 else "RGB") for i in range(24)]
    file = write_parquet(tmp_path / "data" / "train.parquet", pictures)
    augmentation = Augmentation(crop=True, flip=True, shift=1)
    kept, streamed = (
        BatchStream(load_images(file, label_column="label", resolution=8, streaming=streaming), 8, 10, seed=1,
                    augmentation=augmentation)
        for streaming in (False, True)
    )  # fmt: skip
    for number in (0, 4, 1):
        first, second = kept(number), streamed(number)
        assert first.x0.shape == (8, 3, 8, 8)
        for ours, theirs in zip(first[:4], second[:4], strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(kept(0).x0, BatchStream(kept.data, 8, 10, seed=1)(0).x0)


def test_sets_above_the_memory_limit_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def read(rows: list[int]) -> list[np.ndarray]:
        reads.extend(rows)
        return [np.zeros((4, 4), np.uint8) for _ in rows]

    for limit, again in ((10 * 16, 0), (10 * 16 - 1, 3)):
        monkeypatch.setattr("hfdiff.data.images.MEMORY_LIMIT", limit)
        images = gather(read, 10)
        reads.clear()
        images[torch.tensor([1, 2, 5])]
        assert len(reads) == again


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_image_sets_are_indexed_like_tensors() -> None:
    arrays = [np.full((2, 2), level, np.uint8) for level in (0, 51, 255)]
    images = gather(lambda rows: [arrays[row] for row in rows], 3)
    whole = torch.tensor([-1.0, -0.6, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert isinstance(images, ImageSet)
    assert images.shape == whole.shape
    for index in (slice(None), slice(1, 3), slice(0, 0), torch.tensor([2, 0, 2]), torch.tensor([True, False, True])):
        if len(whole[index]):
            torch.testing.assert_close(images[index], whole[index])
    torch.testing.assert_close(images[1], whole[1])


def test_the_shorter_side_is_resized_and_a_square_cropped() -> None:
    ramp = np.tile(np.arange(30, dtype=np.uint8), (10, 1))  # columns 0 to 29
    pixels = to_pixels(PILImage.fromarray(ramp), 10)
    images = ImageSet(lambda rows: [pixels for _ in rows], 1, 1, 10)
    index = torch.zeros(3, dtype=torch.int64)
    left, middle, right = images.crop(index, torch.tensor([[0.5, 0.0], [0.5, 0.5], [0.5, 1.0]]))
    for square, first in ((left, 0), (middle, 10), (right, 20)):
        torch.testing.assert_close((square[0, 0] + 1) * 127.5, torch.arange(first, first + 10).float())
    assert to_pixels(noise_picture((30, 20)), 10).shape == (10, 15, 3)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (PILImage.new("RGB", (1, 1), (255, 0, 51)), [[[255, 0, 51]]]),
        (PILImage.new("RGBA", (1, 1), (0, 0, 0, 0)), [[[255, 255, 255]]]),  # transparent on white
        (PILImage.new("LA", (1, 1), (0, 0)), [[255]]),
        (PILImage.new("1", (1, 1), 1), [[255]]),
        (PILImage.fromarray(np.array([[65535, 257 * 3]], np.uint16)), [[255, 3]]),
    ],
)
def test_every_mode_becomes_grey_or_colour_bytes(picture: PILImage.Image, expected: list) -> None:
    pixels = to_pixels(picture, None)
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == expected


def test_digits_are_scaled_to_minus_one_and_one() -> None:
    train, test = load_images("digits"), load_images("digits", "test")
    pixels = torch.from_numpy(load_digits().images).float()
    assert torch.equal(torch.cat([train.images[:], test.images[:]])[:, 0], pixels / 8 - 1)
    assert train.label_names == [str(digit) for digit in range(10)]
    assert load_images("digits", resolution=16).images.shape == (1500, 1, 16, 16)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_random_shift_moves_whole_images_over_their_border() -> None:
    images = torch.zeros(400, 2, 5, 5) - 1
    images[:, 0, 2, 2], images[:, 1, 2, 2] = 1, 0.5
    shifted = random_shift(images, 2, torch.Generator().manual_seed(0))
    assert torch.equal(shifted.flatten(1).sum(1), images.flatten(1).sum(1))
    places = (shifted[:, 0] == 1).nonzero()[:, 1:]
    assert torch.equal(places, (shifted[:, 1] == 0.5).nonzero()[:, 1:])
    assert len(places.unique(dim=0)) == 25
    white = torch.ones(3, 1, 4, 4)
    assert torch.equal(random_shift(white, 3, torch.Generator().manual_seed(0)), white)


def test_flips_are_whole_and_happen_half_the_time() -> None:
    images = torch.tensor([1.0, 2.0, 3.0]).expand(1000, 1, 2, 3)
    flipped = Augmentation(flip=True)(images, torch.arange(1000), torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(flipped == images).flatten(1).all(1))
    assert abs(mirrored.float().mean() - 0.5) < 0.05  # three standard deviations


FLIPS = {
    "left hand": [True, False, False],
    "0": [True, False, False],
    "flag, 2": [False, True, True],
    ("left hand", 2): [True, False, True],
}


@pytest.mark.parametrize(("given", "classes"), FLIPS.items())
def test_images_of_some_classes_alone_are_mirrored(given: str | tuple, classes: list[bool]) -> None:
    images, labels = torch.tensor([1.0, 2.0]).expand(600, 1, 2, 2), torch.arange(600) % 3
    data = LabelledImages(images, labels, ["left hand", "flag", "face"])
    some = choose_flips(LabelSettings(random_flip_classes=given), data)
    index = torch.arange(600).flip(0)
    every, ours = (
        Augmentation(flip=flip)(images, index, torch.Generator().manual_seed(0))[:, 0, 0, 0] == 2
        for flip in (choose_flips(LabelSettings(random_flip=True), data), some)
    )
    assert torch.equal(ours, every & torch.tensor(classes)[labels[index]])
    assert choose_flips(LabelSettings(), data) is False


def test_classes_to_mirror_must_be_there() -> None:
    data = LabelledImages(torch.zeros(2, 1, 2, 2), torch.arange(2), ["face", "flag"])
    for unknown in ("hand", "2", "-1"):
        with pytest.raises(ValueError, match=rf"random_flip_classes.*face, flag, or.*from 0 to 1, got '{unknown}'"):
            choose_flips(LabelSettings(random_flip_classes=f"face,{unknown}"), data)
    with pytest.raises(ValueError, match=r"`random_flip` mirrors.*'face'.*leave one out"):
        LabelSettings(random_flip=True, random_flip_classes="face")


def test_random_crops_reach_every_place_and_no_other() -> None:
    columns = np.tile(np.arange(6, dtype=np.uint8), (4, 1))
    images = ImageSet(lambda rows: [columns for _ in rows], 300, 1, 4)
    crops = Augmentation(crop=True)(images, torch.arange(300), torch.Generator().manual_seed(0))
    firsts = ((crops[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert sorted(set(firsts.tolist())) == [0, 1, 2]
    assert all(abs((firsts == first).float().mean() - 1 / 3) < 0.1 for first in (0, 1, 2))


# --- sources ---------------------------------------------------------------------------------------------------------


def test_files_folders_and_saved_datasets_give_the_same_images_labels_and_names(tmp_path: Path) -> None:
    pictures = [noise_picture((4, 4), i) for i in range(4)]
    file = write_parquet(tmp_path / "data" / "train.parquet", pictures)
    saved = datasets.load_dataset("parquet", data_files=file, split="train")
    saved.save_to_disk(str(tmp_path / "saved"))
    DatasetDict(train=saved).save_to_disk(str(tmp_path / "splits"))
    for i, picture in enumerate(pictures):
        folder = tmp_path / "images" / "train" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i}.png")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    expected = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]) / 127.5 - 1
    for source in (file, tmp_path / "data", arrow, tmp_path / "saved", tmp_path / "splits"):
        data = load_images(str(source), label_column="label")
        torch.testing.assert_close(data.images[:], expected)
        assert (data.labels.tolist(), data.label_names) == ([0, 1, 0, 1], ["cat", "dog"])
    data = load_images(str(tmp_path / "images"), label_column="label")  # in the order of its folders
    torch.testing.assert_close(data.images[:], expected[[0, 2, 1, 3]])
    assert (data.labels.tolist(), data.label_names) == ([0, 0, 1, 1], ["cat", "dog"])
    with pytest.raises(ValueError, match="test"):
        load_images(str(tmp_path / "images"), "test")


def test_a_configuration_is_chosen_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "one.parquet", [noise_picture((2, 2))])
    write_parquet(tmp_path / "two.parquet", [noise_picture((2, 2))] * 2)
    configs = [f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("one", "two")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    settings = TrainingSettings(train_data_dir=str(tmp_path), dataset_config_name="two")
    assert len(load_training_data(settings)[0].images) == 2
    with pytest.raises(ValueError, match=r"[Cc]onfig name is missing"):
        load_images(str(tmp_path))


def test_grey_images_have_one_channel_and_three_among_colours(tmp_path: Path) -> None:
    grey = noise_picture((4, 4), mode="L")
    data = load_images(write_parquet(tmp_path / "grey" / "a.parquet", [grey, grey]))
    assert data.images.shape == (2, 1, 4, 4)
    mixed = load_images(write_parquet(tmp_path / "mixed" / "a.parquet", [grey, noise_picture((4, 4))]))
    assert mixed.images.shape == (2, 3, 4, 4)
    assert torch.equal(mixed.images[0], data.images[0].expand(3, 4, 4))


def test_integers_name_themselves(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [noise_picture((2, 2))] * 3, [2, 0, 2], Value("int32"))
    data = load_images(file, label_column="label")
    assert (data.labels.tolist(), data.label_names) == ([2, 0, 2], ["0", "1", "2"])


GOOD = encode(noise_picture((16, 16)))
JPEG = encode(noise_picture((16, 16)), "JPEG")
FLIPPED = GOOD[:400] + bytes([GOOD[400] ^ 255]) + GOOD[401:]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", [b"no image", b"", GOOD[: len(GOOD) // 2], JPEG[: len(JPEG) // 2], FLIPPED])
def test_an_unreadable_image_is_named_before_any_training(tmp_path: Path, bad: bytes, streaming: bool) -> None:
    file = write_parquet(tmp_path / "a.parquet", [GOOD, GOOD, GOOD, bad])
    with pytest.raises(ValueError, match=r"row 3 of column 'image' in .*a\.parquet.*: .+; replace") as error:
        load_images(file, streaming=streaming)
    assert "\n" not in str(error.value)


def test_an_unreadable_file_of_a_folder_is_named(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        noise_picture((4, 4)).save(tmp_path / "images" / kind / "0.png")
    (tmp_path / "images" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"row 2 .*dog/1\.png"):
        load_images(str(tmp_path / "images"))


@pytest.mark.parametrize(
    ("labels", "label_type", "message"),
    [
        ([0, None, 1], Value("int64"), r"none in row 1 of 'label'"),
        ([0, 1, -1], None, r"from 0 to 1, got -1 in row 2"),
        ([0, 1, -2], Value("int64"), r"got -2 in row 2"),
        ([0, 1, 10**9], Value("int64"), r"got 1000000000 among 3 images"),
        ([0.0, 1.0, 2.0], Value("float32"), r"integers.*float32"),
        (["a", "b", "c"], Value("string"), r"integers.*string.*class_encode_column"),
        ([True, False, True], Value("bool"), r"integers.*bool"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: list, label_type: object, message: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", [GOOD] * 3, labels, label_type)
    with pytest.raises(ValueError, match=f"label_column.*{message}"):
        load_images(file, label_column="label")


def test_a_column_that_is_not_there_is_refused_with_the_one_that_looks_right(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [GOOD])
    with pytest.raises(ValueError, match=r"image_column.*\['image', 'label'\].*'img'; `--image_column image` looks"):
        load_images(file, image_column="img")
    with pytest.raises(ValueError, match=r"label_column.*'kind'; `--label_column label` looks"):
        load_images(file, label_column="kind")
    with pytest.raises(ValueError, match=r"image_column.*must hold pictures.*ClassLabel"):
        load_images(file, image_column="label")


def test_images_of_several_sizes_or_not_square_need_a_resolution(tmp_path: Path) -> None:
    white = [PILImage.new("L", (4, 4), 255), PILImage.new("L", (6, 4), 255)]
    mixed = write_parquet(tmp_path / "mixed" / "a.parquet", white)
    with pytest.raises(ValueError, match=r"4 by 6 pixels in row 1; give a `resolution`"):
        load_images(mixed)
    assert load_images(mixed, resolution=2).images[:].tolist() == torch.ones(2, 1, 2, 2).tolist()
    with pytest.raises(ValueError, match=r"4 by 6 pixels in row 0; give a `resolution`"):
        load_images(write_parquet(tmp_path / "wide" / "a.parquet", white[1:] * 2))


def test_datasets_that_are_not_there_empty_or_no_datasets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.csv").write_text("image,label\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    write_parquet(tmp_path / "empty.parquet", [])
    sources = {"missing.parquet": "no such", "missing": "no such", "folder": "", "table.csv": ".arrow"}
    for name, reason in {**sources, "torn.parquet": "", "empty.parquet": ""}.items():
        with pytest.raises(ValueError, match=rf"dataset must be .*{name}.*{reason}") as error:
            load_images(str(tmp_path / name))
        assert "\n" not in str(error.value)


# --- training and validation data ------------------------------------------------------------------------------------


def test_digits_bring_their_own_test_images_and_files_none(tmp_path: Path) -> None:
    data, validation = load_training_data(TrainingSettings())
    assert (len(data.images), len(validation.images)) == (1500, 297)
    file = write_parquet(tmp_path / "a.parquet", [GOOD])
    assert load_training_data(TrainingSettings(dataset_name=file))[1] is None


def test_validation_data_must_be_other_images_of_the_same_kind(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [GOOD] * 3, [0, 1, 2], Value("int64"))
    fewer = write_parquet(tmp_path / "b.parquet", [GOOD] * 2, [0, 1], Value("int64"))
    _, validation = load_training_data(TrainingSettings(dataset_name=file, validation_data=fewer), "label")
    assert validation.label_names == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"validation_data.*other images"):
        load_training_data(TrainingSettings(dataset_name=file, validation_data=file), "label")
    smaller = write_parquet(tmp_path / "c.parquet", [noise_picture((8, 8))] * 3, [0, 1, 2], Value("int64"))
    for other in (smaller, write_parquet(tmp_path / "d.parquet", [GOOD] * 3, [0, 1, 0])):
        with pytest.raises(ValueError, match=r"validation_data.*shape.*classes"):
            load_training_data(TrainingSettings(dataset_name=file, validation_data=other), "label")


def test_random_crops_need_a_resolution() -> None:
    with pytest.raises(ValueError, match=r"center_crop.*resolution"):
        TrainingSettings(center_crop=False)


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 3, 8, 8)])
def test_an_npz_of_channels_first_says_where_they_are(tmp_path, shape):
    np.savez(tmp_path / "samples.npz", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"its channels are on axis 1: save `images.transpose\(0, 2, 3, 1\)`"):
        open_images(tmp_path / "samples.npz")
    with pytest.raises(ValueError, match=r"its channels are on axis 3: save `images.permute\(0, 3, 1, 2\)`"):
        images_in_memory(np.zeros(shape, dtype=np.uint8).transpose(0, 2, 3, 1))
