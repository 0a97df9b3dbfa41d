"""Which files a distribution is made of, as sha256 by path, found without importing any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import (
    Distribution,
    EntryPoint,
    PackageNotFoundError,
    distribution,
    entry_points,
)
from importlib.util import find_spec
from pathlib import Path

from picotron_core.registry.plugins import GROUP
from picotron_core.registry.types import Candidate, normalise

BUNDLED_PACKAGE = "picotron_backends"
ENTRY_POINTS = "entry_points.txt"  # which module a plugin's name leads to: as good as code
LOOP = "a link to a folder that holds it"  # in place of a sha256: what lies behind it is unknown


def digest(files: Mapping[str, str]) -> str:
    """One sha256 for many files: over their paths and hashes, in the order of the paths."""
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def distribution_files(name: str, package: str) -> dict[str, str]:
    """Every file of an installed distribution, and its entry points; empty where there is none."""
    files = {path: _hashed(file) for path, file in distribution_paths(name, package).items()}
    installed = _installed(name)
    points = None if installed is None else installed.read_text(ENTRY_POINTS)
    if points is not None:
        files[ENTRY_POINTS] = hashlib.sha256(points.encode()).hexdigest()
    return files


def distribution_paths(name: str, package: str) -> dict[str, Path]:
    """Where its files lie, by their names in a certificate.

    Those of its installation record, and all in the folder of `package`: the record of an editable
    install names no source, and of a file that was added later no record knows.
    """
    return package_paths(package) | _recorded_paths(name)


def package_files(package: str) -> dict[str, str]:
    """The files of an importable package or module, found without importing it."""
    return {path: _hashed(file) for path, file in package_paths(package).items()}


def package_paths(package: str) -> dict[str, Path]:
    """Where they lie. A folder among them is a link to a folder that holds it; see `LOOP`."""
    try:
        spec = find_spec(package) if package else None
    except (ImportError, ValueError):  # it says of itself that it is not there
        spec = None
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        origins = [Path(spec.origin)] if spec.has_location and spec.origin else []
        return {path.name: path for path in origins if path.is_file()}
    found = {}
    for folder in map(Path, spec.submodule_search_locations):
        for path in _below(folder):
            if _counts(path.relative_to(folder.parent)):
                found[path.relative_to(folder.parent).as_posix()] = path
    return found


def package_of(candidate: Candidate) -> str:
    """The top-level package that declares a backend."""
    if candidate.provider.bundled:
        return BUNDLED_PACKAGE
    for point in entry_points(group=GROUP):
        if point.name == candidate.provider.plugin:
            return point.module.partition(".")[0]
    return str(candidate.backend.supports.__module__).partition(".")[0]


def points_of(plugin: str) -> list[EntryPoint]:
    """Where the registry would load a plugin from; it refuses one that is there twice."""
    wanted = normalise(plugin)
    return [point for point in entry_points(group=GROUP) if normalise(point.name) == wanted]


def _below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file, behind links to folders too, for Python imports through them."""
    real = folder.resolve()
    if any(real == other or real in other.parents for other in above):
        yield folder  # to enter it would never end, or read the whole disk
        return
    try:
        inside = sorted(folder.iterdir())
    except OSError:  # what may not be read cannot be imported
        return
    for path in inside:
        if path.is_dir():
            yield from _below(path, (*above, real))
        elif path.is_file():
            yield path


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except (PackageNotFoundError, ValueError):  # ValueError: a name that cannot be one
        return None


def _recorded_paths(name: str) -> dict[str, Path]:
    installed = _installed(name)
    if installed is None or _is_editable(installed):
        return {}
    found = {}
    for entry in installed.files or ():
        path = Path(str(installed.locate_file(entry)))
        if _counts(Path(entry)) and path.is_file():
            found[entry.as_posix()] = path
    return found


def _is_editable(installed: Distribution) -> bool:
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable", False))


def _counts(path: Path) -> bool:
    """Not what differs between two installs of the same thing: caches, scripts, the record.

    A .pyc beside the sources counts: where there is no source, it is the module.
    """
    return not (
        "__pycache__" in path.parts
        or path.parts[0] == ".."  # scripts: their first line names this machine's Python
        or path.parts[0].endswith((".dist-info", ".egg-info"))
    )


def _hashed(path: Path) -> str:
    if path.is_dir():
        return LOOP
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
