"""The Space, served in a process of its own for the tests."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopback_hub import LoopbackHub

from hfdiff.hub.space import export_space

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces" / "classifier-guidance"
SECONDS_TO_START = 180


# Starts a deployed Space without what its `requirements.txt` does not name, and tells whose hfdiff it is.
AS_DEPLOYED = """
import sys
for name in ("datasets", "torchmetrics", "matplotlib", "sklearn", "scipy", "jsonargparse", "spaces"):
    sys.modules[name] = None
import app, hfdiff
print(hfdiff.__file__, flush=True)
app.build().launch(**app.launch_options())
"""


@contextmanager
def serve(folder: Path, *arguments: str, space: Path = SPACE, **variables: str) -> Iterator[str]:
    """The address of a Space that keeps its files in a folder.

    Args:
        folder: where its log, its process id and what it sends are.
        arguments: of Python; default: app.py.
        space: its code.
        variables: of its environment.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "sent"), "HF_HUB_OFFLINE": "1"}
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *(arguments or ["app.py"])],
            cwd=space,
            env={**os.environ, **settings, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}/"
    folder.joinpath("pid").write_text(str(process.pid))
    try:
        _wait(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait()


@contextmanager
def serve_deployed(folder: Path) -> Iterator[str]:
    """The address of a Space in the folder that is deployed, offline."""
    space = export_space(SPACE, folder / "space")
    with serve(folder, "-c", AS_DEPLOYED, space=space, HF_HOME=str(folder / "home")) as address:
        yield address


@contextmanager
def serve_from_hub(folder: Path, guided: str, ncsn: str) -> Iterator[tuple[str, LoopbackHub]]:
    """The address of a Space that is to show these pipelines, and a loopback Hub that has all but `guided`."""
    with LoopbackHub() as hub:
        for repo_id, name in (("hfdiff/mnist-classifier-guided", "mnist-classifier-guided"), (ncsn, "mnist-ncsn")):
            source = ROOT / "pipelines" / name
            paths = [path for path in source.rglob("*") if path.is_file()]
            hub.add(repo_id, {path.relative_to(source).as_posix(): path.read_bytes() for path in paths})
        variables = {**hub.environment(folder / "home"), "HFDIFF_MODEL": guided, "HFDIFF_NCSN_MODEL": ncsn}
        with serve(folder, **{**variables, "HF_HUB_OFFLINE": "0"}) as address:
            yield address, hub


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"The Space did not start:\n{log.read_text()}")
