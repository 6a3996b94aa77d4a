"""The Space as programs use it: the same images as its code, refusals in a sentence, nothing but what it offers."""

import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
from space_server import SPACE

from hfdiff.pipelines.hub_download import bundled_source

gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")

GUIDED = {"labels": ["3", "1"], "guidance_scale": 6.0, "steps": 4, "scheduler": "DDPM", "seed": 5}
SWEEP = {"label": "8", "guidance_scales": ["0", "4", "16"], "steps": 4, "scheduler": "DDIM", "seed": 2}
KINDS = {"model": "Emoji", "labels": ["face", "flag"], "guidance_scale": 14, "steps": 3, "scheduler": "DDPM", "seed": 4}
EMOJI = {**KINDS, "second_label": "twitter", "second_scale": 12}
LANGEVIN = {"count": 2, "steps": 8, "sampling": "consistent", "seed": 7}


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return gradio_client.Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def images_of(client, endpoint, **inputs):
    _, archive, report = client.predict(**inputs, api_name=endpoint)
    return np.load(archive)["arr_0"], report


def answer(request):
    """Status and text of what comes back."""
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


@pytest.mark.parametrize(
    ("endpoint", "inputs"),
    [
        ("/guided", GUIDED),
        ("/guided", {**GUIDED, "scheduler": "Euler ancestral", "guided_from": 0.25, "guided_to": 0.75}),
        ("/guided", {**GUIDED, "scheduler": "UniPC"}),
        ("/guided", {**GUIDED, "scheduler": "Annealed Langevin", "steps": 12}),
        ("/guided", KINDS),
        ("/guided", EMOJI),
        ("/guided", {**EMOJI, "scheduler": "DPM-Solver++"}),
        ("/guided", {**GUIDED, "model": "NCSN digits", "scheduler": "Annealed Langevin", "steps": 12}),
        ("/sweep", SWEEP),
        ("/sweep", {**SWEEP, "model": "Emoji", "label": "sign", "second_label": "google", "second_scale": 6}),
        ("/langevin", LANGEVIN),
        ("/langevin", {**LANGEVIN, "sampling": "predictor_corrector"}),
    ],
)
def test_the_code_that_it_shows_draws_the_same_pixels(client, endpoint, inputs):
    """In another process than the Space's, this one."""
    images, report = images_of(client, endpoint, **inputs)
    names = {}
    exec(report["code"].replace(report["model"], bundled_source(report["model"])), names)
    drawn = np.stack([np.asarray(image) for image in names["images"]])
    np.testing.assert_array_equal(drawn.reshape(images.shape), images)


def test_guidance_raises_the_probability_of_the_class(client):
    labels = list("0123456789")
    _, report = images_of(client, "/guided", labels=labels, steps=20, guidance_scale=8, seed=1)
    guided, unguided = np.array(report["probabilities"]).reshape(2, 10)
    assert guided.mean() > 0.9
    assert unguided.mean() < 0.5
    _, report = images_of(client, "/sweep", label="8", steps=20, seed=3)
    assert report["probabilities"][-1] > report["probabilities"][0]


def test_the_second_classifier_guides_too(client):
    faces, styles = {**EMOJI, "labels": ["face", "face"], "steps": 10}, {}
    for style in ("google", "twitter"):
        _, report = images_of(client, "/guided", **{**faces, "second_label": style})
        styles[style] = report["second_probabilities"]
    guided, unguided = np.split(np.array(list(styles.values())), 2, axis=1)
    assert guided.mean() > 0.8
    np.testing.assert_allclose(unguided.sum(axis=0), 1, atol=1e-3)  # p(google) + p(twitter) of the same images
    _, report = images_of(client, "/guided", **KINDS)
    assert "second_probabilities" not in report


def test_everybody_gets_the_images_of_their_seed(client, address):
    def draw(seed):
        mine = gradio_client.Client(address, verbose=False)
        return images_of(mine, "/guided", **{**GUIDED, "seed": seed})[0]

    seeds = [1, 2, 3, 4, 1, 2]
    with ThreadPoolExecutor(len(seeds)) as pool:
        drawn = list(pool.map(draw, seeds))
    alone = {seed: images_of(client, "/guided", **{**GUIDED, "seed": seed})[0] for seed in set(seeds)}
    for seed, images in zip(seeds, drawn):
        np.testing.assert_array_equal(images, alone[seed])
    assert not np.array_equal(alone[1], alone[2])


@pytest.mark.parametrize(
    ("endpoint", "inputs", "message"),
    [
        ("/guided", {"labels": []}, "Classes must be 1 to 10"),
        ("/guided", {"labels": ["cat"]}, "cat"),
        ("/guided", {"labels": None}, "Classes"),
        ("/guided", {"guidance_scale": "much"}, "Guidance scale must be a number from 0 to 100, got 'much'"),
        ("/guided", {"guidance_scale": 100.5}, "100"),
        ("/guided", {"guidance_scale": -1}, "0"),
        ("/guided", {"guidance_scale": None}, "Guidance scale"),
        ("/guided", {"guidance_scale": True}, "Guidance scale"),
        ("/guided", {"steps": 0}, "1"),
        ("/guided", {"steps": 2.5}, "Steps must be a whole number"),
        ("/guided", {"steps": 10**9}, "100"),
        ("/guided", {"scheduler": "__class__"}, "__class__"),
        ("/guided", {"scheduler": "Annealed Langevin", "steps": 3}, "at least 11"),
        ("/guided", {"seed": -1}, "0"),
        ("/guided", {"seed": 2**40}, "4294967295"),
        ("/guided", {"guided_from": 0.8, "guided_to": 0.2}, "must not be after"),
        ("/guided", {"model": "Cats"}, "Model must be one of Digits, Emoji, NCSN digits; got 'Cats'"),
        ("/guided", {"model": None}, "Model must be one of"),
        ("/guided", {"model": "Emoji"}, "Classes must be one of face, hand"),
        ("/guided", {**GUIDED, "second_label": "google"}, "Second label must be empty for a model of one classifier"),
        ("/guided", {**EMOJI, "second_label": "apple"}, "Second label must be one of google, twitter; got 'apple'"),
        ("/guided", {**EMOJI, "second_scale": 101}, "Second scale must be a number from 0 to 100"),
        ("/guided", {**GUIDED, "model": "NCSN digits"}, "Scheduler must be one of Annealed Langevin; got 'DDPM'"),
        ("/sweep", {**SWEEP, "second_label": "google"}, "Second label must be empty"),
        ("/sweep", {"label": "10"}, "10"),
        ("/sweep", {"guidance_scales": []}, "Guidance scales must be 1 to 10"),
        ("/langevin", {"count": 11}, "10"),
        ("/langevin", {"sampling": "fast"}, "fast"),
        ("/langevin", {"steps": 251}, "250"),
    ],
)
def test_wrong_inputs_are_refused_in_a_sentence(client, endpoint, inputs, message):
    with pytest.raises(gradio_client.exceptions.AppError) as refusal:
        client.predict(**inputs, api_name=endpoint)
    assert message in str(refusal.value)
    assert "Traceback" not in str(refusal.value)


@pytest.mark.parametrize("data", [[], [{}], "text", {"a": 1}, [None] * 7, [[["3"]], {}, [], "x", 1e999, "", 0], None])
def test_malformed_requests_leave_it_alive(client, address, data):
    body = json.dumps({"data": data, "fn_index": 0, "session_hash": "x"}).encode()
    for path in ("gradio_api/call/guided", "gradio_api/queue/join", "gradio_api/run/guided"):
        request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
        assert "Traceback" not in answer(request)[1]
    images, _ = images_of(client, "/guided", **GUIDED)
    assert images.shape == (4, 28, 28, 1)


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={SPACE / 'app.py'}",
        "gradio_api/file=app.py",
        "gradio_api/file=../../README.md",
        "monitoring",
        "gradio_api/monitoring",
        "gradio_api/mcp/",
        "docs",
        "openapi.json",
    ],
)
def test_there_is_nothing_but_the_page(address, path):
    status, _ = answer(urllib.request.Request(address + path))
    assert status in (403, 404, 405)


def test_the_queue_cannot_be_skipped_and_uploads_are_small(address):
    body = json.dumps({"data": [["3"], 8, 4, "DDPM", 0, 0, 1]}).encode()
    request = urllib.request.Request(address + "gradio_api/run/guided", body, {"Content-Type": "application/json"})
    assert answer(request)[0] in (401, 404)
    content = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n' + b"x" * 65536
    upload = urllib.request.Request(
        address + "gradio_api/upload",
        content + b"\r\n--b--\r\n",
        {"Content-Type": "multipart/form-data; boundary=b"},
    )
    assert answer(upload)[0] == 413


def test_a_model_that_does_not_open_is_told_and_replaced(from_hub, tmp_path):
    client = gradio_client.Client(from_hub[0], verbose=False, download_files=str(tmp_path))
    notes = [str(part["props"].get("value")) for part in client.config["components"]]
    assert any("`nobody/nothing` did not open" in note for note in notes)
    assert images_of(client, "/guided", **GUIDED)[1]["model"] == "hfdiff/mnist-classifier-guided"


def test_pipelines_come_from_the_hub_where_they_are_named(from_hub, tmp_path):
    """The other is the bundled one, for which the Hub is not asked; the code names what was opened."""
    address, hub = from_hub
    client = gradio_client.Client(address, verbose=False, download_files=str(tmp_path))
    assert not any("user/ncsn` did not open" in str(part["props"].get("value")) for part in client.config["components"])
    images, report = images_of(client, "/guided", **GUIDED)
    assert images.shape == (4, 28, 28, 1)
    assert "from_pretrained('hfdiff/mnist-classifier-guided')" in report["code"]
    assert images_of(client, "/langevin", **LANGEVIN)[1]["model"] == "user/ncsn"
    asked = {repo_id for repo_id, *_ in hub.requests}
    assert "user/ncsn" in asked
    assert "hfdiff/mnist-classifier-guided" not in asked


def test_what_is_deployed_needs_nothing_of_this_checkout(address, served, client):
    """In the folder as it is sent, hfdiff is its own and only what `requirements.txt` names is imported."""
    assert served.joinpath("log").read_text().startswith(str(served / "space" / "hfdiff"))
    assert images_of(client, "/guided", **GUIDED)[1]["model"] == "hfdiff/mnist-classifier-guided"
    assert images_of(client, "/langevin", **LANGEVIN)[1]["model"] == "hfdiff/mnist-ncsn"
    assert not any("did not open" in str(part["props"].get("value")) for part in client.config["components"])


def test_the_code_of_its_card_runs(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", SPACE.joinpath("README.md").read_text(), flags=re.DOTALL)
    assert "http://127.0.0.1:7860" in code  # where a reader has the Space
    exec(code.replace("http://127.0.0.1:7860", address), {})
