"""Every test run keeps its caches in a folder of its own, which is gone afterwards; nothing is left behind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Where libraries keep what they make on the way; read when they are imported, so set before.
CACHES = {
    "HF_HOME": "huggingface",
    "GRADIO_TEMP_DIR": "gradio",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "MPLCONFIGDIR": "matplotlib",
}
OWNER, TEMPORARY = "HFDIFF_TESTS_FOLDER", tempfile.gettempdir()
IS_OWNER = OWNER not in os.environ  # the first process; its workers and what tests start use its folder
if IS_OWNER:
    os.environ[OWNER] = tempfile.mkdtemp(prefix="hfdiff-tests-")
HOME = Path(os.environ[OWNER])
os.environ["TMPDIR"] = tempfile.tempdir = str(HOME)
os.environ.update({name: str(HOME / folder) for name, folder in CACHES.items()})
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker for each core, not a thread

import torch  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    if config.option.basetemp is None and IS_OWNER:
        config.option.basetemp = str(HOME / "pytest")


def pytest_unconfigure() -> None:
    if IS_OWNER:
        shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Neither in the checkout nor beside the tests' own folder."""
    places = [Path(TEMPORARY), Path(__file__).parents[1]] if IS_OWNER else []
    before = {path for place in places for path in place.iterdir()}
    yield
    after = {path for place in places for path in place.iterdir()}
    left = {path for path in after - before if path.name not in ("__pycache__", ".pytest_cache")}
    assert not left, f"the tests left {sorted(map(str, left))} behind"
