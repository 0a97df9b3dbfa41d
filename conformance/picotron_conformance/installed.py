"""What a backend comes from and rests on, as it is installed: names, versions and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from picotron_core.registry.sources import distribution_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A distribution, or a module that belongs to none, on which a kernel rests.

    package: the top-level module that was imported; empty where only the distribution was named.
    files: sha256 by path; empty for what comes with Picotron, of which the version is enough.
    """

    distribution: str  # empty for a module that belongs to none
    version: str
    package: str
    files: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.distribution or self.package


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where one backend comes from.

    files: sha256 by path, of every file of the distribution; see `sources`.
    entry_point: the module that the plugin's name leads to; empty for bundled backends.
    rests_on: what else is installed without which it would be another kernel.
    """

    op: str
    name: str  # the qualified name
    distribution: str
    version: str
    package: str  # what holds the plugin's module: "picotron_backends"
    files: Mapping[str, str]
    entry_point: str = ""
    rests_on: tuple[Installed, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.op}={self.name}"


def required(requirements: Iterable[str]) -> tuple[Installed, ...]:
    """What a declaration names under `requires`."""
    return tuple(look_at(Requirement(text).name) for text in requirements)


def holders_of(package: str) -> tuple[Installed, ...]:
    """What a top-level module was installed by; of a namespace there can be several."""
    names = packages_distributions().get(package) or [""]
    return tuple(look_at(name, package) for name in dict.fromkeys(names))


def look_at(distribution: str, package: str = "") -> Installed:
    known = canonicalize_name(distribution) in comes_with_picotron()
    return Installed(
        distribution=distribution,
        version=version_of(distribution),
        package=package,
        files={} if known else distribution_files(distribution, package),
    )


def version_of(distribution: str) -> str:
    """Empty where it is not installed."""
    try:
        return version(distribution)
    except (PackageNotFoundError, ValueError):  # ValueError: a name that cannot be one
        return ""


@cache
def comes_with_picotron() -> frozenset[str]:
    """Picotron, what it depends on, what that depends on, and so forth."""
    found: set[str] = set()
    todo = {"picotron"}
    while todo:
        name = todo.pop()
        found.add(name)
        for text in _needs(name):
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo |= {str(canonicalize_name(need.name))} - found
    return frozenset(found)


def _needs(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:  # for another platform, or torch under another name
        return []
