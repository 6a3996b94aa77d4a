"""Names that are imported when they are first used, so that `import hfdiff` and its help need not wait for torch."""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package that finds its public names in its modules, also a function in the module of the same name."""

    def __getattr__(self, name: str) -> Any:
        homes = self.__dict__["__homes__"]
        if name not in homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name], self.__name__), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__dict__["__homes__"]):  # set when a module is imported
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__dict__["__homes__"]})


def lazy_names(package: str, homes: Mapping[str, str]) -> list[str]:
    """Makes public names of a package that are imported when they are first used.

    Args:
        package: its `__name__`.
        homes: the names, several in one string, by the module that has them, relative to the package.

    Returns:
        The names, for `__all__`.
    """
    module = sys.modules[package]
    module.__dict__["__homes__"] = {name: home for home, names in homes.items() for name in names.split()}
    module.__class__ = _LazyPackage
    return sorted(module.__dict__["__homes__"])


class _Unread(ModuleType):
    """Stands in `sys.modules` for a module that is imported when one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what others look at when they go through all modules
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def announce(module: str) -> None:
    """Makes a module count as imported without reading it.

    diffusers opens a folder's third-party components only from modules that are in `sys.modules` already.
    """
    if module not in sys.modules:
        spec = find_spec(module)
        assert spec is not None
        unread = _Unread(module)
        unread.__spec__, unread.__loader__, unread.__file__ = spec, spec.loader, spec.origin
        sys.modules[module] = unread
