"""Which files a distribution is made of, as sha256 by path, found without importing any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from pathlib import Path

from picotron_core.registry.plugins import GROUP
from picotron_core.registry.types import Candidate

BUNDLED_PACKAGE = "picotron_backends"


def digest(files: Mapping[str, str]) -> str:
    """One sha256 for many files: over their paths and hashes, in the order of the paths."""
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def distribution_files(name: str, package: str) -> dict[str, str]:
    """Every file of an installed distribution; empty where there is none.

    Those of its installation record, and all in the folder of `package`: the record of an editable
    install names no source, and of a file that was added later no record knows.
    """
    return package_files(package) | _recorded_files(name)


def package_files(package: str) -> dict[str, str]:
    """The files of an importable package or module, found without importing it."""
    try:
        spec = find_spec(package) if package else None
    except (ImportError, ValueError):  # it says of itself that it is not there
        spec = None
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        origins = [Path(spec.origin)] if spec.has_location and spec.origin else []
        return {path.name: _sha256(path) for path in origins}
    found = {}
    for folder in map(Path, spec.submodule_search_locations):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and _counts(path.relative_to(folder.parent)):
                found[path.relative_to(folder.parent).as_posix()] = _sha256(path)
    return found


def package_of(candidate: Candidate) -> str:
    """The top-level package that declares a backend."""
    if candidate.provider.bundled:
        return BUNDLED_PACKAGE
    for point in entry_points(group=GROUP):
        if point.name == candidate.provider.plugin:
            return point.module.partition(".")[0]
    return str(candidate.backend.supports.__module__).partition(".")[0]


def _recorded_files(name: str) -> dict[str, str]:
    try:
        installed = distribution(name)
    except (PackageNotFoundError, ValueError):  # ValueError: a name that cannot be one
        return {}
    if _is_editable(installed):
        return {}
    found = {}
    for entry in installed.files or ():
        path = Path(str(installed.locate_file(entry)))
        if _counts(Path(entry)) and path.is_file():
            found[entry.as_posix()] = _sha256(path)
    return found


def _is_editable(installed: Distribution) -> bool:
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable", False))


def _counts(path: Path) -> bool:
    """Not what differs between two installs of the same thing: caches, scripts, the record."""
    return not (
        path.suffix in (".pyc", ".pyo")
        or "__pycache__" in path.parts
        or path.parts[0] == ".."  # scripts: their first line names this machine's Python
        or path.parts[0].endswith((".dist-info", ".egg-info"))
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
