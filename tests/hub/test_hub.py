"""Publishing and opening over HTTP, against a small Hub on 127.0.0.1; nothing of the client is replaced.

Three fresh processes do the work (`hub_process.py`), the tests look at what they and the Hub saw.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_process
import pytest
import torch
from hub_process import draw
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from safetensors.torch import load, save
from tiny_models import make_pipeline

from hfdiff import AnnealedLangevinScheduler, NCSNPipeline, NCSNv2Model

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
FILES = ("model_index.json", SCHEDULER, "unet/config.json", WEIGHTS)
ALWAYS = 99
PAGE = b"<html>Log in</html>"
SENTENCE = re.compile(r"[^\n]+\.")

# name: (what goes wrong, how it is asked for, how it ends); "ok" or the kind of error and what it says
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "cut-at-0": ([{"endpoint": "content", "cut_at": 0}], {}, "ok"),
    "cut-at-1": ([{"endpoint": "content", "cut_at": 1}], {}, "ok"),
    "cut-in-the-middle": ([{"endpoint": "content", "cut_at": 40_000}], {}, "ok"),
    "cut-before-the-last-byte": ([{"endpoint": "content", "cut_at": -1}], {}, "ok"),
    "cut-when-long": ([{"endpoint": "content", "cut_at": 11_000_000}], {}, "ok"),
    "cut-twice": ([{"endpoint": "content", "cut_at": 50_000, "times": 2}], {}, "ok"),
    "stalls": ([{"endpoint": "content", "delay": 4}], {}, "ok"),
    "too-fast": ([{"endpoint": "content", "status": 429, "headers": {"Retry-After": "0"}}], {}, "ok"),
    "busy": ([{"endpoint": "resolve", "status": 503}], {}, "ok"),
    "corrupt-once": ([{"endpoint": "content", "body": "corrupt"}], {}, "ok"),
    "other-etag": ([{"endpoint": "resolve", "path": SCHEDULER, "headers": {"ETag": '"' + "0" * 40 + '"'}}], {}, "ok"),
    "down-but-cached": ([{"endpoint": "info", "status": 503, "skip": 2, "times": ALWAYS}], {"times": 2}, "ok"),
    "silent-but-cached": ([{"endpoint": "info", "delay": 4, "skip": 2, "times": ALWAYS}], {"times": 2}, "ok"),
    "corrupt": ([{"endpoint": "content", "body": "corrupt", "times": ALWAYS}], {}, "OSError: damaged"),
    "short": ([{"endpoint": "content", "body": "short", "times": ALWAYS}], {}, "ConnectionError: size"),
    "broken-store": ([{"endpoint": "content", "status": 500, "times": ALWAYS}], {}, "ConnectionError: out of order"),
    "lost-store": ([{"endpoint": "content", "status": 404, "times": ALWAYS}], {}, "ConnectionError: .404.; try"),
    "login-page-as-config": (
        [{"endpoint": "resolve", "path": SCHEDULER, "body": PAGE, "times": ALWAYS}],
        {},
        "OSError: damaged",
    ),
    "hung-up": ([{"endpoint": "info", "drop": True, "times": ALWAYS}], {}, "ConnectionError: connection"),
    "down": ([{"endpoint": "info", "status": 503, "times": ALWAYS}], {}, "ConnectionError: out of order .503."),
    "error": ([{"endpoint": "info", "status": 500, "times": ALWAYS}], {}, "ConnectionError: out of order .500."),
    "silent": ([{"endpoint": "info", "delay": 4, "times": ALWAYS}], {}, "ConnectionError: too long"),
    "limited": ([{"endpoint": "info", "status": 429, "times": ALWAYS}], {}, "ConnectionError: too many requests"),
    "forbidden": ([{"endpoint": "info", "status": 403, "times": ALWAYS}], {}, "PermissionError: token"),
    "login-page": ([{"endpoint": "info", "body": PAGE, "times": ALWAYS}], {}, "ConnectionError: not the Hub's"),
    "bad-list": ([{"endpoint": "tree", "body": PAGE, "times": ALWAYS}], {}, "ConnectionError: not the Hub's"),
    "lost-file": (
        [{"endpoint": "resolve", "path": SCHEDULER, "status": 404, "headers": {"X-Error-Code": "EntryNotFound"}}],
        {},
        "FileNotFoundError: not on the Hub",
    ),
    "wrong-token": ([], {"token": "stolen"}, "PermissionError: hf auth login"),
    "no-revision": ([], {"revision": "v9"}, "FileNotFoundError: no revision 'v9'"),
    "no-repository": ([], {}, "FileNotFoundError: no repository"),
    "no-variant": ([], {"variant": "fp16"}, "ValueError: `variant` must"),
    "gated": ([], {}, "PermissionError: gated"),
    "private": ([], {}, "FileNotFoundError: private"),
    "private-with-token": ([], {"token": "reads"}, "ok"),
    "no-pipeline": ([], {}, "FileNotFoundError: model_index.json"),
    "never-seen": ([], {"local_files_only": True}, "FileNotFoundError: cache"),
    "tagged": ([], {"revision": "v1"}, "ok"),
    "a/b": ([], {}, "ValueError: Hub id"),
}
PUSHES = {
    "commit": ("user/push-1", {"endpoint": "commit", "status": 503}, "ConnectionError: out of order"),
    "upload": ("user/push-2", {"endpoint": "upload", "status": 403}, "PermissionError: 403"),
    "list": ("user/push-3", {"endpoint": "preupload", "status": 400, "body": b"{}"}, "ConnectionError: user/push-3"),
}


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces" / "classifier-guidance"
SPACES = {
    "first": ("writes", [SPACE, "user/show", "--model", "user/digits", "--private"]),
    "again": ("writes", [SPACE, "show"]),
    "wrong": ("writes", [ROOT / "docs", "user/none"]),
    "stranger": ("reads", [SPACE, "user/show"]),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    model = NCSNv2Model(8, 1, 4, num_levels=4, sigma_max=1.0).eval()
    NCSNPipeline(model, AnnealedLangevinScheduler(4, 0.01, 1.0, steps_per_level=1)).save_pretrained(folder / "ncsn")
    make_pipeline().save_pretrained(folder / "guided")
    return folder


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "ncsn" / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def errors(hub: LoopbackHub, folder: Path, content: dict[str, bytes]) -> str:
    """What the processes of all stages, which have then ended, wrote to their standard error."""
    bad = {"corrupt": content[WEIGHTS][:-1] + bytes([content[WEIGHTS][-1] ^ 1]), "short": content[WEIGHTS][:-1]}
    for name, (faults, _, _) in CASES.items():
        if name in ("no-repository", "a/b"):
            continue
        files = (
            {**content, WEIGHTS: save(load(content[WEIGHTS]), {"long": "x" * 12_000_000})}
            if "long" in name
            else content
        )
        hub.add(f"user/{name}", files, private="private" in name, gated=name == "gated")
        for fault in faults:
            hub.fail(f"user/{name}", **{**fault, "body": bad.get(fault.get("body"), fault.get("body"))})
    del hub.repositories["user/no-pipeline"].commits[hub.repositories["user/no-pipeline"].refs["main"]][FILES[0]]
    tagged = hub.repositories["user/tagged"]
    tagged.refs["v1"] = tagged.refs["main"]
    tagged.commit({SCHEDULER: b"{}"})
    for repo_id, fault, _ in PUSHES.values():
        hub.fail(repo_id, **fault)
    pixels = draw(NCSNPipeline.from_pretrained(folder / "ncsn"), "ncsn").hex()
    fetch = {name: options for name, (_, options, _) in CASES.items()}
    pushes = {name: repo_id for name, (repo_id, _, _) in PUSHES.items()}
    spaces = [(token, list(map(str, arguments))) for token, arguments in SPACES.values()]
    cases = {"fetch": fetch, "push": pushes, "spaces": spaces, "pixels": pixels}
    timeouts = {"HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3"}
    stages = {
        "publish": (hub.environment(folder / "home", "writes", **timeouts), cases),
        "bare": (hub.environment(folder / "bare-home"), {}),
        "offline": (hub.environment(folder / "home", HF_HUB_OFFLINE="1"), {}),
    }
    command = [sys.executable, hub_process.__file__, str(folder)]
    return subprocess.run(command, input=json.dumps(stages), capture_output=True, text=True, check=True).stderr


def results(folder: Path, stage: str, errors: str) -> dict[str, Any]:
    path = folder / f"{stage}.json"
    assert path.exists(), errors[-4000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def published(folder: Path, errors: str) -> dict[str, Any]:
    """What the first process saw: it publishes, opens, and goes through the cases."""
    return results(folder, "publish", errors)


@pytest.fixture(scope="module")
def bare(folder: Path, errors: str) -> dict[str, Any]:
    """What a process without hfdiff saw."""
    return results(folder, "bare", errors)


# --- publishing and opening ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["guided", "ncsn"])
def test_a_pulled_pipeline_draws_the_pixels_of_the_pushed_one(published: dict[str, Any], kind: str) -> None:
    assert published[kind]


@pytest.mark.parametrize("kind", ["guided", "ncsn"])
def test_without_hfdiff_the_pixels_are_the_same_and_it_saves_again(bare: dict[str, Any], kind: str) -> None:
    module, again, own = bare[kind]
    assert module.startswith("diffusers_modules.")
    assert again
    assert own
    assert bare["hfdiff"][0] == "ModuleNotFoundError"


def test_code_is_run_by_those_alone_who_trust_it(bare: dict[str, Any]) -> None:
    assert bare["ncsn distrusted"][0] == "ValueError"
    assert "trust_remote_code" in bare["ncsn distrusted"][1]


def test_offline_the_cache_is_enough(folder: Path, errors: str) -> None:
    found = results(folder, "offline", errors)
    assert found["warm"] == [True, True]
    for what in ("cold", "push"):
        assert SENTENCE.fullmatch(found[what][1])
    assert found["cold"][0] == "FileNotFoundError"


def test_a_variant_is_fetched_alone_from_a_private_repository(hub: LoopbackHub, published: dict[str, Any]) -> None:
    assert hub.repositories["user/half"].private
    assert published["half"] == ["diffusion_pytorch_model.fp16.safetensors"]


def test_the_repository_is_safetensors_code_picture_and_card(hub: LoopbackHub, published: dict[str, Any]) -> None:
    repository = hub.repositories["user/guided"]
    files = repository.commits[repository.refs["main"]]
    assert len(repository.commits) == 2  # the empty one, and one with everything
    assert {"README.md", "samples.png", "pipeline.py", "classifier/layers.py", "scheduler/noise.py"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    assert load(files[WEIGHTS])
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == ["pipeline", "ClassifierGuidedPipeline"]
    assert index["classifier"] == ["noisy_classifier", "NoisyClassifier"]
    assert not [name for name, text in files.items() if name.endswith(".json") and b"_name_or_path" in text]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("hfdiff", "mit")
    assert "![Samples](samples.png)" in card.text
    assert 'ClassifierGuidedPipeline.from_pretrained("user/guided")' in card.text
    assert 'from_pretrained("user/guided", trust_remote_code=True)' in card.text


@pytest.mark.parametrize("name", PUSHES)
def test_a_failed_push_leaves_nothing_and_goes_on_when_repeated(
    hub: LoopbackHub, published: dict[str, Any], name: str
) -> None:
    repo_id, _, expected = PUSHES[name]
    first, second = published["push"][name]
    _check(first, expected)
    assert second[0] == "ok"
    repository = hub.repositories[repo_id]
    assert next(len(files) for files in repository.commits.values()) == 1  # the failed push added no commit
    assert len(repository.commits) == 2
    uploads = [request for request in hub.requests if request[:2] == (repo_id, "upload")]
    assert len(uploads) <= (2 if name == "upload" else 1)  # what is there is not sent again


# --- Spaces ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pushed(published: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the commands returned and printed."""
    return dict(zip(SPACES, published["spaces"]))


def test_a_pushed_space_has_all_it_needs(hub: LoopbackHub, pushed: dict[str, dict[str, Any]]) -> None:
    assert pushed["first"]["code"] == 0, pushed["first"]["errors"]
    assert pushed["first"]["output"].startswith(hub.url)
    repository = hub.repositories["user/show"]
    files = repository.commits[repository.refs["main"]]
    assert files["app.py"] == SPACE.joinpath("app.py").read_bytes()
    weights = "mnist-classifier-guided/unet/diffusion_pytorch_model.safetensors"
    assert files[f"pipelines/{weights}"] == ROOT.joinpath("pipelines", weights).read_bytes()
    assert {"hfdiff/__init__.py", "pipelines/mnist-ncsn/model_index.json", "requirements.txt"} <= set(files)
    assert not [name for name in files if "__pycache__" in name or "mnist-judge" in name]
    assert (repository.sdk, repository.private) == ("gradio", True)
    assert repository.variables == {"HFDIFF_MODEL": "user/digits"}


def test_a_space_is_pushed_again(hub: LoopbackHub, pushed: dict[str, dict[str, Any]]) -> None:
    assert pushed["again"]["code"] == 0, pushed["again"]["errors"]
    assert len(hub.repositories["user/show"].commits) == 3  # made, pushed, pushed


def test_what_is_no_space_and_who_may_not_write_is_told(hub: LoopbackHub, pushed: dict[str, dict[str, Any]]) -> None:
    assert pushed["wrong"]["code"] == 2
    assert "`folder` must be a Gradio Space" in pushed["wrong"]["errors"]
    assert "user/none" not in hub.repositories
    assert pushed["stranger"]["code"] == 2
    assert "may only read" in pushed["stranger"]["errors"]
    assert "Traceback" not in pushed["wrong"]["errors"] + pushed["stranger"]["errors"]


# --- broken networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_it_recovers_or_says_why_not(published: dict[str, Any], name: str) -> None:
    expected = CASES[name][2]
    for result in published["fetch"][name]:
        _check(result, expected)


@pytest.mark.parametrize("name", CASES)
def test_what_is_then_in_the_cache_is_whole_or_not_opened(published: dict[str, Any], name: str) -> None:
    found = published["open"][name]
    if CASES[name][2] == "ok":
        assert found == ["ok"]
    else:
        assert found[0].endswith("Error")
        assert SENTENCE.fullmatch(found[1]), found


def test_an_interrupted_download_goes_on_where_it_was(hub: LoopbackHub, published: dict[str, Any]) -> None:
    ranges = [request[2] for request in hub.requests if request[:2] == ("user/cut-when-long", "content")]
    assert ranges == ["", "bytes=10485760-"]  # the client keeps what it has in pieces of 10 MiB


def _check(result: list[str], expected: str) -> None:
    kind, _, words = expected.partition(": ")
    assert result[0] == kind, result
    if words:
        assert re.search(words, result[1]), result
        assert SENTENCE.fullmatch(result[1]), result
