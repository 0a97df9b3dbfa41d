"""How what is installed now differs from what was recorded of a backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from picotron_conformance.bytecode import forged
from picotron_conformance.installed import Installed, Origin, version_of
from picotron_core.registry.sources import (
    BUNDLED_PACKAGE,
    LOOP,
    distribution_files,
    distribution_paths,
    points_of,
)

MOST_FILES = 5
BUNDLED = "picotron"  # the plugin's name that all bundled backends have


class Now:
    """What is installed; each distribution is read once, for many backends share one."""

    def __init__(self) -> None:
        self._files = cache(distribution_files)
        self._forged = cache(_forged)

    def differences(self, origin: Origin) -> Iterator[str]:
        """A line each; none where what would run now is what was recorded."""
        here = version_of(origin.distribution)
        if not here:
            yield f"{origin.distribution} is not installed here"
            return
        yield from _led_elsewhere(origin)
        own = Installed(
            distribution=origin.distribution,
            version=origin.version,
            package=origin.package,
            files=origin.files,
        )
        yield from self._of(own)
        for installed in origin.rests_on:
            yield from (f"of what it rests on, {line}" for line in self._of(installed))

    def _of(self, then: Installed) -> Iterator[str]:
        here = version_of(then.distribution)
        if here != then.version:
            what = f"{then.name} {here} is installed" if here else f"{then.name} is not installed"
            yield f"{what}; certified is {then.version or 'one without a version'}"
            return
        if not then.files:
            return
        what = f"{then.name} {here}".rstrip()
        if changes := _changes(then.files, self._files(then.distribution, then.package)):
            yield f"{what} has other files than certified: {changes}"
        for line in self._forged(then.distribution, then.package):
            yield f"{what} has bytecode that may not be its own: {line}; delete it"


def unclear(origin: Origin) -> Iterator[str]:
    """What was recorded, and yet says too little of what runs."""
    for path, sha256 in origin.files.items():
        if sha256 == LOOP:
            yield f"{origin.distribution}: {path} is {LOOP}, so no list of its files is whole"
    for installed in origin.rests_on:
        loops = [path for path, sha256 in installed.files.items() if sha256 == LOOP]
        if loops:
            yield f"{installed.name}: {loops[0]} is {LOOP}, so no list of its files is whole"
        if not installed.files and not installed.version:
            yield f"it imported {installed.name}, of which no file was found"


def _led_elsewhere(origin: Origin) -> Iterator[str]:
    """The registry finds a plugin by its entry point, wherever that leads by now."""
    plugin = origin.name.partition("/")[0]
    if plugin == BUNDLED:
        if origin.package != BUNDLED_PACKAGE or origin.entry_point:
            yield f"{origin.name} is bundled, and not of {origin.package}"
        return
    points = points_of(plugin)
    if len(points) != 1:
        count = "no distribution provides" if not points else "more than one distribution provides"
        yield f"{count} a plugin {plugin!r} here"
        return
    (point,) = points
    if point.value != origin.entry_point or point.module.partition(".")[0] != origin.package:
        yield (
            f"the plugin {plugin!r} is {point.value!r} here; certified is "
            f"{origin.entry_point!r} in {origin.package}"
        )
    if point.dist is not None and point.dist.name != origin.distribution:
        yield (
            f"the plugin {plugin!r} is {point.dist.name}'s here; certified is {origin.distribution}"
        )


def _forged(distribution: str, package: str) -> tuple[str, ...]:
    paths: Mapping[str, Path] = distribution_paths(distribution, package)
    return tuple(forged(paths.values()))


def _changes(then: Mapping[str, str], here: Mapping[str, str]) -> str:
    changes = {path: "changed" for path in then.keys() & here.keys() if then[path] != here[path]}
    changes |= dict.fromkeys(then.keys() - here.keys(), "missing")
    changes |= dict.fromkeys(here.keys() - then.keys(), "added")
    words = [f"{path} {change}" for path, change in sorted(changes.items())]
    more = [f"{len(words) - MOST_FILES} more"] if len(words) > MOST_FILES else []
    return ", ".join(words[:MOST_FILES] + more)
