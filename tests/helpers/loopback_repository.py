"""What the loopback Hub keeps: repositories, and what is to go wrong with requests to them."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.utils.sha import git_hash

LARGE = (".safetensors", ".png", ".bin")


@dataclass
class Repository:
    """Commits, each the content of all files, and branches and tags, which name commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # of a Space
    sdk: str | None = None

    def commit(self, changes: dict[str, bytes], branch: str = "main") -> str:
        """Adds files to those of a branch's last commit."""
        files = {**self.commits.get(self.refs.get(branch, ""), {}), **changes}
        name = hashlib.sha1(f"{sorted(files)}{len(self.commits)}".encode()).hexdigest()
        self.commits[name], self.refs[branch] = files, name
        return name


@dataclass
class Fault:
    """What goes wrong with some requests to a repository.

    Args:
        endpoint: name of a route.
        times: after so many requests all is well.
        skip: before it, so many requests are well.
        status: of the answer.
        headers: of the answer, besides its own.
        body: instead of the answer's.
        cut_at: bytes after which the connection ends.
        delay: seconds until the answer.
        drop: close the connection without an answer.
        path: of the file, where only one is meant.
    """

    endpoint: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut_at: int | None = None
    delay: float = 0.0
    drop: bool = False
    path: str = ""


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


def file_entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it: its checksum is git's, of a pointer where it is large."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
    if is_large(name):
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        lfs = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
        entry |= {"oid": git_hash(pointer), "lfs": lfs}
    return entry
