"""What the tests of the Hub run in fresh processes, for which a loopback Hub is the Hub.

    publish   push the pipelines of FOLDER, open them again, and go through the cases
    bare      open them where hfdiff is not installed
    offline   open them from the cache

`python hub_process.py FOLDER` runs them in this order, each in a process of its own. Their environments and cases come
as JSON on the standard input, by stage; results go to FOLDER. The Hub's client reads its environment when it is
imported, so the processes share the import of torch, and none of what imports the client.
"""

import importlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

SHARED = ("torch._dynamo", "torch.distributed.fsdp", "scipy.stats", "scipy.optimize", "matplotlib.pyplot")

CALLS: dict[str, dict[str, Any]] = {
    "guided": {"class_labels": [0, 1], "num_inference_steps": 3},
    "ncsn": {"batch_size": 2, "num_inference_steps": 4},
}


class Absent:
    """Makes `import hfdiff` fail, as where it is not installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "hfdiff":
            raise ModuleNotFoundError(name)


def draw(pipe: Any, kind: str) -> bytes:
    """The pixels of a pipeline's images."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**CALLS[kind], generator=generator, output_type="np").images.tobytes()


def outcome(function: Any, *args: Any, **kwargs: Any) -> list[str]:
    """What a call ends with: "ok" and its result, or the kind of error and what it says."""
    try:
        return ["ok", str(function(*args, **kwargs))]
    except Exception as error:
        return [type(error).__name__, str(error)]


def told(token: str, arguments: list[str]) -> dict[str, Any]:
    """What a command returns and prints for a user of this token."""
    from hfdiff.cli import main

    os.environ["HF_TOKEN"] = token
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = main(arguments)
    return {"code": code, "output": output.getvalue(), "errors": errors.getvalue()}


def publish(folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    from hfdiff import ClassifierGuidedPipeline, NCSNPipeline
    from hfdiff.cli import main
    from hfdiff.hub.repository import push
    from hfdiff.pipelines.hub_download import fetch

    kinds = {"guided": ClassifierGuidedPipeline, "ncsn": NCSNPipeline}
    results: dict[str, Any] = {"push": {}, "fetch": {}, "open": {}}
    for kind, pipeline in kinds.items():
        local = pipeline.from_pretrained(folder / kind)
        assert main(["push", str(folder / kind), f"user/{kind}", "--license", "mit"]) == 0
        pulled = pipeline.from_pretrained(f"user/{kind}")
        assert type(pulled.scheduler).__module__.startswith("hfdiff.")
        (folder / f"{kind}.pixels").write_bytes(draw(pulled, kind))
        results[kind] = draw(local, kind) == draw(pulled, kind)
    for variant in (None, "fp16"):
        pulled.push_to_hub("half", private=True, variant=variant, picture=False)
    kinds["ncsn"].from_pretrained("user/half", variant="fp16", cache_dir=folder / "half")
    results["half"] = [path.name for path in (folder / "half").rglob("*.safetensors")]
    for name, repo_id in cases["push"].items():
        results["push"][name] = [outcome(push, folder / "ncsn", repo_id, picture=False) for _ in range(2)]

    results["spaces"] = [told(token, ["push-space", *arguments]) for token, arguments in cases["spaces"]]

    def attempt(item: tuple[str, dict[str, Any]]) -> tuple[str, list[list[str]]]:
        name, options = item
        times = options.pop("times", 1)
        arguments = {"cache_dir": folder / "caches" / name, "token": False, **options}
        return name, [outcome(fetch, f"user/{name}", **arguments) for _ in range(times)]

    with ThreadPoolExecutor(12) as pool:
        results["fetch"] = dict(pool.map(attempt, cases["fetch"].items()))
    for name, options in cases["fetch"].items():
        offline = {"cache_dir": folder / "caches" / name, "local_files_only": True, "revision": options.get("revision")}
        found = outcome(lambda: draw(kinds["ncsn"].from_pretrained(f"user/{name}", **offline), "ncsn").hex())  # noqa: B023
        results["open"][name] = ["ok" if found[1] == cases["pixels"] else "other pixels"] if found[0] == "ok" else found
    return results


def bare(folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    sys.meta_path.insert(0, Absent)  # type: ignore[arg-type]
    from diffusers import DiffusionPipeline

    results: dict[str, Any] = {}
    for kind in CALLS:
        pixels = (folder / f"{kind}.pixels").read_bytes()
        for options in ({}, {"custom_pipeline": f"user/{kind}"}):
            pipe = DiffusionPipeline.from_pretrained(f"user/{kind}", trust_remote_code=True, **options)
            assert draw(pipe, kind) == pixels
        pipe.save_pretrained(folder / "again" / kind)
        again = DiffusionPipeline.from_pretrained(folder / "again" / kind, trust_remote_code=True)
        own = type(pipe).from_pretrained(folder / "again" / kind)
        results[kind] = [type(pipe).__module__, draw(again, kind) == pixels, draw(own, kind) == pixels]
        results[f"{kind} distrusted"] = outcome(DiffusionPipeline.from_pretrained, f"user/{kind}")
    results["hfdiff"] = outcome(__import__, "hfdiff")
    return results


def offline(folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    from hfdiff import NCSNPipeline

    warm = NCSNPipeline.from_pretrained("user/ncsn")
    saved = NCSNPipeline.from_pretrained(folder / "again" / "ncsn")
    pixels = (folder / "ncsn.pixels").read_bytes()
    return {
        "warm": [draw(pipe, "ncsn") == pixels for pipe in (warm, saved)],
        "cold": outcome(NCSNPipeline.from_pretrained, "user/never-seen"),
        "push": outcome(warm.push_to_hub, "user/ncsn", picture=False),
    }


def run(name: str, folder: Path, environment: dict[str, str], cases: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    results = {"publish": publish, "bare": bare, "offline": offline}[name](folder, cases)
    (folder / f"{name}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    for shared in SHARED:
        with suppress(ImportError):
            importlib.import_module(shared)
    assert not {"huggingface_hub", "diffusers", "transformers", "hfdiff"} & sys.modules.keys()
    for stage, (given, asked) in json.loads(sys.stdin.read()).items():
        process = multiprocessing.get_context("fork").Process(target=run, args=(stage, Path(sys.argv[1]), given, asked))
        process.start()
        process.join()
