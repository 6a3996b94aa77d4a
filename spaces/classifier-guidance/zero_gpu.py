"""ZeroGPU, where a Space has it: a GPU is lent for the seconds that a drawing asks for."""

from collections.abc import Callable
from typing import Any

SECONDS_TO_START = 5.0
SECONDS_PER_STEP = 0.06  # two networks and a backward pass, with room to spare
MOST_SECONDS = 60.0


def seconds(settings: Any) -> float:
    """How long a drawing of so many `steps` may take on a GPU."""
    return min(MOST_SECONDS, SECONDS_TO_START + SECONDS_PER_STEP * settings.steps)


def on_gpu(draw: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Lends a function of settings a GPU on ZeroGPU; elsewhere it is the function itself."""
    try:
        import spaces
    except ImportError:
        return draw
    lend = getattr(spaces, "GPU", None)  # a folder of that name is no package
    return draw if lend is None else lend(duration=seconds)(draw)
