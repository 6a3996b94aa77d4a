"""The code of README and docs runs as it stands; their commands have flags that exist; their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from hfdiff.cli import parser
from hfdiff.commands.train import KINDS
from hfdiff.training.config import parse_settings
from hfdiff.training.settings import SETTINGS

ROOT = Path(__file__).parents[1]
RUN = ("README.md", "docs/usage.md", "docs/evaluation.md")
PAGES = sorted(
    {
        *map(ROOT.joinpath, RUN),
        *ROOT.glob("spaces/*/README.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("training/*.md"),
        ROOT / "CONTRIBUTING.md",
    }
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """The lines of all shell blocks that call hfdiff, without their comments."""
    found = [block for page in PAGES for block in blocks(page, "bash")]
    lines = [line for block in found for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("hfdiff ")]


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs_from_top_to_bottom(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()  # as the demo leaves it
    code = "\n".join(blocks(ROOT / name, "python"))
    assert code
    exec(compile(code, name, "exec"), {})


@pytest.mark.parametrize("command", sorted({*commands()}))
def test_a_command_of_the_pages_has_flags_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, *words = shlex.split(command)
    if words[0] == "train":
        assert words[1] in KINDS
        parse_settings(SETTINGS[words[1]], words[2:])
    else:
        assert parser()[0].parse_args(words).command == words[0]


def test_there_are_commands():
    assert {shlex.split(command)[1] for command in commands()} >= {
        "sample",
        "train",
        "evaluate",
        "push",
        "convert",
        "sweep",
    }


def test_every_local_link_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
