"""Plots need matplotlib, which the package itself does not."""

from typing import Any


def figure_class() -> Any:
    """Matplotlib's class of figures.

    Raises:
        ValueError: when it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("A plot needs matplotlib, got none; `pip install 'hfdiff[train]'`.") from error
    return Figure
