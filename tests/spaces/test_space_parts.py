"""The Space's own code: checks, films, the thread that draws, and its deployment."""

import base64
import importlib
import io
import json
import math
import sys
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from space_server import ROOT, SPACE

from hfdiff.hub.space import export_space

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")


@pytest.fixture(scope="module")
def part():
    """Imports a module of the Space by name."""
    sys.path.insert(0, str(SPACE))
    yield importlib.import_module
    sys.path.remove(str(SPACE))


@pytest.mark.parametrize("value", [0, 3, 10, 2.5, np.float32(1)])
def test_numbers_of_the_range_are_taken(part, value):
    assert part("checks").number("It", value, 0, 10) == float(value)


@pytest.mark.parametrize("value", [-1e-9, 10.5, math.nan, math.inf, "3", None, True, [1], {}, 1j, object()])
def test_other_numbers_are_refused_by_name(part, value):
    with pytest.raises(ValueError, match="It must be a number from 0 to 10, got "):
        part("checks").number("It", value, 0, 10)


@pytest.mark.parametrize("value", [0, 11, 2.5, math.nan, -math.inf, "3", None, False, pytest.param(10**400, id="huge")])
def test_other_whole_numbers_are_refused(part, value):
    with pytest.raises(ValueError, match="It must be a whole number from 1 to 10"):
        part("checks").whole("It", value, 1, 10)


def test_choices_keep_their_order_and_repeats(part):
    checks = part("checks")
    assert checks.choices("It", ["b", "a", "b"], "abc") == ("b", "a", "b")
    assert checks.scales("It", ["8", 0, 8.0, "1e1"]) == (0.0, 8.0, 10.0)
    for wrong in ([], ["d"], "ab", None, [["a"]], [1], ["a"] * 11, {"a": 1}):
        with pytest.raises(ValueError, match="It must be"):
            checks.choices("It", wrong, "abc")
    for wrong in ([], ["x"], ["nan"], [None], [101], "8"):
        with pytest.raises(ValueError, match="It must be"):
            checks.scales("It", wrong)


def test_a_label_may_be_left_out(part):
    optional = part("checks").optional
    assert [optional("It", value, "ab") for value in ("", None, "b")] == ["", "", "b"]
    for value in ("c", 1, [], ["a"], False):
        with pytest.raises(ValueError, match="It must be one of a, b; got"):
            optional("It", value, "ab")
    with pytest.raises(ValueError, match="It must be empty for a model of one classifier, got 'a'"):
        optional("It", "a", [])


def test_messages_stay_short(part):
    with pytest.raises(ValueError, match=r"got 'aaa.*\.\.\.") as refusal:
        part("checks").choice("It", "a" * 10_000, "abc")
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("steps", "numel", "expected"), [(1, 100, 1), (5, 100, 5), (100, 100, 24), (100, 2**15, 8), (100, 2**20, 4)]
)
def test_a_film_has_its_ends_and_is_bounded(part, steps, numel, expected):
    shown = part("drawing").frame_steps(steps, numel)
    assert len(shown) == expected
    assert {0, steps - 1} <= shown


def test_a_drawing_nobody_waits_for_ends_at_its_next_report(part):
    drawing, reported, ended = part("drawing"), [], threading.Event()

    def work(report):
        try:
            for i in range(10_000):
                report(i)
                reported.append(i)
                time.sleep(0.001)
        finally:
            ended.set()

    stream = drawing.stream(work)
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    assert ended.wait(5)
    assert len(reported) < 5_000


def test_an_error_while_drawing_reaches_who_waits(part):
    def work(report):
        report(1)
        raise ValueError("no")

    stream = part("drawing").stream(work)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="no"):
        next(stream)


def test_a_film_shows_the_pixels_of_its_frames(part):
    film, drawing = part("film"), part("drawing")
    xt, x0 = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 1), dtype=np.uint8)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.004, 0.996]])
    panels = [
        film.Panel("first", ("a", "b"), slice(0, 2), ((0, 1),)),
        film.Panel("second", ("a", "b"), slice(2, 4), ((0, 1), (1, 0))),
    ]
    shown = film.Film(panels)
    shown.add(drawing.Frame(1, 5, "step 1", xt, x0, probabilities, None))
    first, second = shown.value()["panels"]
    assert first["frames"][0]["notes"] == ["90%", "80%"]
    assert second["frames"][0]["notes"] == ["50%\n50%", "100%\n0%"]  # of two classifiers
    for panel, rows in ((first, slice(0, 2)), (second, slice(2, 4))):
        for name, images in (("xt", xt), ("x0", x0)):
            strip = base64.b64decode(panel["frames"][0][name].partition(",")[2])
            expected = np.concatenate(list(images[rows, ..., 0]), axis=1)
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(strip))), expected)
    json.dumps(shown.value())


def test_frames_are_what_the_pipeline_saw(part):
    """The last frame is the pipeline's own images; x_t and x̂_0 of a step are those of its loop."""
    opening, drawing, guided = part("opening"), part("drawing"), part("guided")
    from hfdiff import ClassifierGuidedPipeline
    from hfdiff.data.pictures import to_bytes
    from hfdiff.sampling import image_generator

    torch.manual_seed(0)
    pipe = ClassifierGuidedPipeline.from_pretrained(ROOT / "pipelines" / "mnist-classifier-guided")
    exhibit = guided.Guided(opening.Models(opening.Opened(pipe, "name", "")))
    settings = exhibit.check(["2", "7"], 5, 4, "DDPM", 11, 0, 1, "", 0, "name")
    frames = list(drawing.film(exhibit.pipeline(settings), **exhibit.arguments(settings)))
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5]
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**exhibit.arguments(settings), output_type="np").images
    np.testing.assert_array_equal(frames[-1].x0, to_bytes(expected))
    noise = torch.cat([torch.randn(1, 1, 28, 28, generator=image_generator(11, i)) for i in (0, 1)])
    seen = to_bytes((noise / 2 + 0.5).permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(frames[0].xt, np.concatenate([seen, seen]))
    with torch.no_grad():
        t = pipe.scheduler.timesteps[0]
        probabilities = pipe.classifier(torch.cat([noise, noise]), t).logits.softmax(-1)
    np.testing.assert_allclose(frames[0].probabilities, probabilities.numpy(), rtol=1e-4)


def test_pipelines_are_those_that_variables_name(part, monkeypatch):
    """A folder; a Hub id, in whose place the bundled one is opened where it cannot be reached."""
    folder = str(ROOT / "pipelines" / "mnist-ncsn")
    monkeypatch.setenv("HFDIFF_NCSN_MODEL", folder)
    monkeypatch.setenv("HFDIFF_MODEL", "nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models, ncsn = part("opening").open_pipelines()
    assert (ncsn.name, ncsn.note) == (folder, "")
    assert models.names == ["Digits", "Emoji", "NCSN digits"]
    guided = models["Digits"]
    assert guided.name == "hfdiff/mnist-classifier-guided"
    assert "`nobody/nothing` did not open" in guided.note
    assert not torch.nn.Linear(1, 1).weight.is_meta  # nothing of the opening is left


def test_classes_are_in_order_and_may_have_no_names(part):
    """Those of a classifier without names are asked for by index, by the call and by its code."""
    from hfdiff import NoisyClassifier

    def opened(id2label):
        torch.manual_seed(0)
        classifier = NoisyClassifier(
            8, 1, 11, model_channels=8, num_head_channels=8, norm_num_groups=4, id2label=id2label
        )
        parts = {"device": torch.device("cpu"), "scheduler": None, "default_guidance_scale": 1.0}
        return part("opening").Opened(SimpleNamespace(classifier=classifier, **parts), "name", "")

    names = {str(i): f"class {i}" for i in (10, *range(10))}  # as JSON with sorted keys has them
    (guide,) = opened(names).guides
    assert guide.labels == [f"class {i}" for i in range(11)]
    guided = part("guided").Guided(part("opening").Models(opened(None)))
    settings = part("guided").Settings(("10", "2"), 1.0, 2, "own", 0, (0.0, 1.0), "", 0.0, "name")
    assert guided.arguments(settings)["class_labels"] == [10, 2, 10, 2]


@pytest.fixture(scope="module")
def models(part):
    """Those of the page."""
    return part("opening").open_pipelines()[0]


def test_models_open_once_and_one_at_a_time(part, models, monkeypatch):
    opening, inside, seen, opened = part("opening"), [], [], []
    shelf = opening.Models(models["Digits"])

    def slow(kind, name, note=""):
        inside.append(name)
        seen.append(len(inside))
        time.sleep(0.05)
        inside.remove(name)
        return opening.Opened(None, name, note)

    monkeypatch.setattr(opening, "open_bundled", slow)
    threads = [
        threading.Thread(target=lambda name=name: opened.append(shelf[name])) for name in ("Emoji", "NCSN digits") * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1]
    assert len({id(one) for one in opened}) == 2
    assert shelf["Digits"] is models["Digits"]


def test_the_model_that_a_variable_names_is_the_first(part, monkeypatch):
    folder = str(ROOT / "pipelines" / "mnist-ncsn-guided")
    monkeypatch.setenv("HFDIFF_MODEL", folder)
    models, _ = part("opening").open_pipelines()
    assert models.names == [folder, "Digits", "Emoji", "NCSN digits"]
    assert models[folder].name == folder


def values(components):
    return [component.value for component in components]


def test_controls_follow_the_model(part, models):
    guided = part("guided").Guided(models)
    name, note, labels, scale, style, style_scale, steps, scheduler = guided.choose("Emoji")
    assert (name, note.visible, style.visible, style_scale.visible) == ("Emoji", False, True, True)
    assert [label for label, _ in labels.choices][:2] == ["face", "hand"]
    assert style.choices == [("any", ""), ("google", "google"), ("twitter", "twitter")]
    assert values([labels, scale, style, style_scale, steps]) == [["face", "hand", "person"], 14, "", 20, 25]
    name, _, labels, scale, style, _, steps, scheduler = guided.choose("NCSN digits")
    assert (name, style.visible) == ("NCSN digits", False)
    assert [label for label, _ in labels.choices] == list("0123456789")
    assert scheduler.choices == [("Annealed Langevin", "Annealed Langevin")]
    assert values([scale, steps]) == [8, 50]
    assert part("sweep").Sweep(models).choose("Emoji")[2].value == "sign"


def test_a_model_that_does_not_open_is_told_when_it_is_chosen(part, models, monkeypatch):
    """The first model takes its place on the page; a program is refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(part("opening"), "bundled_source", lambda name: "nobody/nothing")
    guided = part("guided").Guided(part("opening").Models(models["Digits"]))
    name, note, labels, *_ = guided.choose("Emoji")
    assert (name, note.visible, labels.value) == ("Digits", True, ["3", "1", "4"])
    assert "Emoji did not open, so choose another model." in note.value
    with pytest.raises(ValueError, match="Emoji did not open"):
        guided.check(["face"], 14, 2, "DDPM", 0, 0, 1, "", 0, "Emoji")


@pytest.mark.parametrize("style", ["", "twitter"])
def test_two_classifiers_guide_with_a_scale_each(part, models, style):
    """Probabilities are those that each classifier gives alone; the second half of the batch is not guided."""
    guided, drawing = part("guided").Guided(models), part("drawing")
    settings = guided.check(["face", "flag"], 14, 2, "DDPM", 5, 0, 1, style, 12, "Emoji")
    frames = list(drawing.film(guided.pipeline(settings), **guided.arguments(settings)))
    pipe = guided.pipeline(settings)
    alone = pipe(
        batch_size=2, num_inference_steps=2, output_type="np", generator=guided.arguments(settings)["generator"][:2]
    ).images  # fmt: skip
    np.testing.assert_allclose(frames[-1].x0[2:] / 255, alone, atol=2 / 255)  # batches of other sizes round differently
    x0 = torch.from_numpy(frames[-1].x0).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = [m(x0, torch.tensor(0)).logits.softmax(-1).numpy() for m in pipe.classifier.members.values()]
    told = [panel.probabilities(frames[-1]) for panel in guided.panels(settings)]
    for rows, by_guide in zip((slice(0, 2), slice(2, 4)), told):
        np.testing.assert_allclose(by_guide[0], np.diag(expected[0][rows][:, [0, 9]]), atol=0.02)  # of rounded pixels
        assert len(by_guide) == (2 if style else 1)
        if style:
            np.testing.assert_allclose(by_guide[1], expected[1][rows][:, 1], atol=0.02)
    assert [plot.visible for plot in guided.plots(settings, frames)][2:] == [bool(style)] * 2


def test_a_space_that_cannot_be_written_is_not_there(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hfdiff.hub.space.shutil.copytree", full)
    with pytest.raises(OSError, match="No space left"):
        export_space(SPACE, tmp_path / "space")
    assert not list(tmp_path.iterdir())
    tmp_path.joinpath("taken").mkdir()
    tmp_path.joinpath("taken", "file").touch()
    with pytest.raises(ValueError, match="`destination` must be a new or an empty folder"):
        export_space(SPACE, tmp_path / "taken")


def test_a_gpu_is_lent_for_the_time_of_the_steps(part, monkeypatch):
    zero_gpu, lent = part("zero_gpu"), []

    def gpu(duration):
        def decorate(function):
            return lambda settings: lent.append(duration(settings)) or function(settings)

        return decorate

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=gpu))
    draw = zero_gpu.on_gpu(lambda settings: "drawn")
    assert [draw(SimpleNamespace(steps=steps)) for steps in (10, 100, 10_000)] == ["drawn"] * 3
    assert lent[0] < lent[1] < lent[2] <= 60
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace())  # a folder of that name
    assert zero_gpu.on_gpu(draw) is draw
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert zero_gpu.on_gpu(draw) is draw


def test_the_front_matter_is_what_runs_here():
    import gradio
    from huggingface_hub import metadata_load

    card = metadata_load(SPACE / "README.md")
    assert card["sdk_version"] == gradio.__version__
    assert f"gradio=={gradio.__version__}" in ROOT.joinpath("constraints.txt").read_text().splitlines()
