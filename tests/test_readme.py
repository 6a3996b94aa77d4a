"""The Python of the README and of docs/evaluation.md runs as it stands, from the repository's root."""

import re
from pathlib import Path

import pytest
from space_server import serve

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "evaluation.md", ROOT / "spaces" / "classifier-guidance" / "README.md")
SERVED = "http://127.0.0.1:7860"  # where a reader has the Space
EXAMPLES = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    if SERVED not in example:
        exec(compile(example, "README.md", "exec"), {})
        return
    with serve(tmp_path) as address:
        exec(compile(example.replace(SERVED, address), "README.md", "exec"), {})


def test_there_are_examples():
    assert EXAMPLES


def test_every_local_link_leads_somewhere():
    for page in (*PAGES, *ROOT.glob("docs/*.md"), *ROOT.glob("training/*.md"), ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
