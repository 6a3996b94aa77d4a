"""Checks of what a visitor sends, on the server: whatever a page or a program sends is not to be trusted.

Each raises a ValueError whose message the visitor reads.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

MOST_IMAGES = 10
MOST_STEPS = 100
MOST_SCALE = 100.0
MOST_SEED = 2**32 - 1


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number of a range."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {_shown(value)}.")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number of a range, which a page may send as a float."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high or value != int(value):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {_shown(value)}.")
    return int(value)


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    """One of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {_listed(known)}; got {_shown(value)}.")
    return value


def optional(name: str, value: Any, known: Sequence[str]) -> str:
    """One of the known names, or the empty one for none of them."""
    if value is None or value == "":
        return ""
    if not known:
        raise ValueError(f"{name} must be empty for a model of one classifier, got {_shown(value)}.")
    return choice(name, value, known)


def choices(name: str, values: Any, known: Sequence[str]) -> tuple[str, ...]:
    """Some of the known names, in the order they came in, with repeats."""
    _check_count(name, values)
    return tuple(choice(name, value, known) for value in values)


def scales(name: str, values: Any) -> tuple[float, ...]:
    """Guidance scales, each once, ascending; a page sends them as text."""
    _check_count(name, values)
    return tuple(sorted({number(name, _parsed(value), 0, MOST_SCALE) for value in values}))


def _check_count(name: str, values: Any) -> None:
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= MOST_IMAGES:
        raise ValueError(f"{name} must be 1 to {MOST_IMAGES} of them, got {_shown(values)}; choose some.")


def _parsed(value: Any) -> Any:
    """The number that a text is, or what it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(known: Sequence[str]) -> str:
    return ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
