"""Which foreign modules a kernel brings into the process that asks it.

Two looks, for each sees what the other cannot: what is new in `sys.modules` after a check, and what
the plugin's modules refer to, which may have been there before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import packages_distributions
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from packaging.utils import canonicalize_name

from picotron_conformance.installed import Installed, comes_with_picotron, holders_of
from picotron_core.registry.sources import package_of
from picotron_core.registry.types import Candidate

# Certified by other means: torch and Python are told by version, Picotron by hash.
OURS = {"picotron_core", "picotron_backends", "picotron_conformance"}
OURS |= {"torch", "functorch", "torchgen", "__main__"} | sys.stdlib_module_names
# May import more at any time; pluggy is also behind Picotron's own `hookimpl`.
RUNNER = {"pytest", "_pytest", "pluggy", "xdist", "execnet"}


@dataclass(slots=True)
class Imports:
    """Of this process; a backend's foreign modules are told once."""

    kernels: dict[Candidate, Any] = field(default_factory=dict)
    told: dict[Candidate, set[str]] = field(default_factory=dict)
    loaded: dict[Candidate, bool] = field(default_factory=dict)  # when last looked

    @contextmanager
    def watched(self, candidate: Candidate) -> Iterator[list[Installed]]:
        """The list is filled when the block ends, and the files hashed while they are new."""
        before = set(sys.modules)
        found: list[Installed] = []
        yield found
        new = {name.partition(".")[0] for name in sys.modules.keys() - before}
        loaded = candidate in self.kernels
        if candidate.provider.bundled or not (new or self.loaded.get(candidate) is not loaded):
            return
        self.loaded[candidate] = loaded
        told = self.told.setdefault(candidate, set())
        for package in sorted(self._foreign(candidate, new) - told):
            told.add(package)
            found += holders_of(package)

    def _foreign(self, candidate: Candidate, new: set[str]) -> set[str]:
        own = package_of(candidate)
        start = {own, *_holding(candidate.backend.supports), *_holding(candidate.backend.load)}
        start |= _holding(self.kernels.get(candidate))
        # What torch imports for itself, when a part of it is first used, is not the kernel's.
        new = {p for p in new - OURS - RUNNER if _has_files(p) and not _is_known(p)}
        if new:
            new -= _referred(n for n in sys.modules if _is_known(n.partition(".")[0]))
        return {p for p in _reached(start | new) - OURS - RUNNER - {own} if _has_files(p)}


def _reached(start: set[str]) -> set[str]:
    """The top-level modules that these refer to, and that those refer to, and so forth."""
    found: set[str] = set()
    todo = set(start)
    while todo:
        package = todo.pop()
        found.add(package)
        if package not in OURS and not _is_known(package):
            inside = [name for name in sys.modules if name.partition(".")[0] == package]
            todo |= _referred(inside) - found
    return found


def _referred(names: Iterable[str]) -> set[str]:
    """The top-level modules of what stands in the global names of these modules."""
    found: set[str] = set()
    for name in list(names):
        module = sys.modules.get(name)
        for value in list(vars(module).values()) if isinstance(module, ModuleType) else ():
            found |= _holding(value)
    return found


def _holding(value: Any) -> set[str]:
    """The top-level module that a module, a function or a class lies in, or a kernel's class."""
    kind = type(value)  # not isinstance, which asks the value: some import or warn when asked
    if kind is partial:
        return _holding(value.func)
    if issubclass(kind, ModuleType):
        name: Any = value.__name__
    elif issubclass(kind, (FunctionType, MethodType, BuiltinFunctionType, type)):
        name = value.__module__
    else:
        name = kind.__module__
    return {name.partition(".")[0]} if isinstance(name, str) and name else set()


def _has_files(package: str) -> bool:
    module = sys.modules.get(package)
    return bool(getattr(module, "__file__", None) or getattr(module, "__path__", None))


@cache
def _is_known(package: str) -> bool:
    """Whether it comes with Picotron, or is Python's own."""
    names = _distributions().get(package, [])
    known = bool(names) and {str(canonicalize_name(n)) for n in names} <= comes_with_picotron()
    return known or package in OURS


@cache  # it reads the record of everything that is installed
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()
