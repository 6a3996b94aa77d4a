"""Every test run keeps its caches in a folder of its own, which is gone afterwards; nothing is left behind."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from groups import InGroups, rank
from left_behind import OWN, present

# Where libraries keep what they make on the way; read when they are imported, so set before.
CACHES = {
    "HF_HOME": "huggingface",
    "GRADIO_TEMP_DIR": "gradio",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "MPLCONFIGDIR": "matplotlib",
}
OWNER, TEMPORARY = "HFDIFF_TESTS_FOLDER", Path(tempfile.gettempdir())
IS_OWNER = OWNER not in os.environ  # the first process; its workers and what tests start use its folder
if IS_OWNER:
    os.environ[OWNER] = tempfile.mkdtemp(prefix=OWN)
    atexit.register(shutil.rmtree, os.environ[OWNER], ignore_errors=True)
HOME = Path(os.environ[OWNER])
os.environ["TMPDIR"] = tempfile.tempdir = str(HOME)
os.environ.update({name: str(HOME / folder) for name, folder in CACHES.items()})
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker for each core, not a thread

before = pytest.StashKey[set[Path]]()
left = pytest.StashKey[list[Path]]()


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> InGroups:
    return InGroups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: rank(item.nodeid.partition("::")[0]))


def pytest_configure(config: pytest.Config) -> None:
    if config.option.basetemp is None and IS_OWNER:
        config.option.basetemp = str(HOME / "pytest")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch  # not in the process that only hands tests to workers

    torch.manual_seed(0)


def pytest_sessionstart(session: pytest.Session) -> None:
    if IS_OWNER:
        session.config.stash[before] = present(TEMPORARY)


@pytest.hookimpl(trylast=True)  # after the workers' end
def pytest_sessionfinish(session: pytest.Session) -> None:
    if IS_OWNER:
        session.config.stash[left] = sorted(present(TEMPORARY) - session.config.stash[before])
        if any(path.parent != TEMPORARY for path in session.config.stash[left]):  # there, others leave things, too
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    paths = config.stash.get(left, [])
    if paths:
        terminalreporter.section("left behind", red=True)
        terminalreporter.line("\n".join(map(str, paths)))
        terminalreporter.line(f"What is in {TEMPORARY} may be another program's, and fails no run.")
