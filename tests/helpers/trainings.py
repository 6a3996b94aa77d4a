"""The trainings of `hfdiff train`, run in this process."""

from collections.abc import Callable, Sequence
from importlib import import_module
from types import SimpleNamespace

from hfdiff.training.config import parse_settings
from hfdiff.training.settings import SETTINGS


def load_training(kind: str) -> SimpleNamespace:
    """The module of a training, its settings, and a `main` of its flags whose errors are not yet told in a line."""
    module = import_module(f"hfdiff.training.train_{kind}")
    main: Callable[[Sequence[str]], None] = lambda flags: module.run(parse_settings(SETTINGS[kind], flags))  # noqa: E731
    return SimpleNamespace(**{**vars(module), SETTINGS[kind].__name__: SETTINGS[kind], "main": main})
