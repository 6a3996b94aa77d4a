"""Two served Spaces for all tests: one as it is deployed, one whose pipelines are to come from the Hub."""

from pathlib import Path

import pytest
from space_server import serve_deployed, serve_from_hub


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the deployed one."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def address(served):
    with serve_deployed(served) as address:
        yield address


@pytest.fixture(scope="session")
def from_hub(tmp_path_factory):
    """Its address, and the Hub."""
    folder = tmp_path_factory.mktemp("from-hub")
    with serve_from_hub(folder, guided="nobody/nothing", ncsn="user/ncsn") as address_and_hub:
        yield address_and_hub
