"""Which tests run in one worker: those of a file, and those of files that share what is slow to make."""

from xdist.scheduler import LoadScopeScheduling

# These take longest, so they start first.
GROUPS = {
    "served Spaces": ("spaces/test_space.py", "spaces/test_space_browser.py"),
    "Hub": ("hub/test_hub.py",),
    "forked processes": (
        "pipelines/test_pipeline.py",
        "training/test_distributed.py",
        "training/test_resume.py",
        "evaluation/test_sweep.py",
        "sampling/test_sample_files.py",
    ),
    "pages": ("test_readme.py",),
    "bundled": ("pipelines/test_bundled.py",),
    "guidance": ("pipelines/test_guidance.py",),
}
RANKS = {f"tests/{file}": (rank, group) for rank, (group, files) in enumerate(GROUPS.items()) for file in files}


def rank(file: str) -> int:
    """When a file's turn is."""
    return RANKS.get(file, (len(GROUPS), file))[0]


class InGroups(LoadScopeScheduling):
    """A worker takes a group at a time, or a file that is in none."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return RANKS.get(file, (0, file))[1]
