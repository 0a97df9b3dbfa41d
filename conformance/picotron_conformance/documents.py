"""The suite's files: JSON that says its kind and format, read with bounds and without trust."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from picotron_core.errors import ConfigError, DamagedFileError, did_you_mean

T = TypeVar("T")

REPORT = "picotron conformance report"
CERTIFICATE = "picotron conformance certificate"
FORMAT = 1
LARGEST = 256 * 2**20  # bytes; a full report of every backend has a tenth of it

_HOW = {
    REPORT: "Write one with: pytest --pyargs picotron_conformance --picotron-report FILE",
    CERTIFICATE: "Write one with: pytest --pyargs picotron_conformance --picotron-profile full "
    "--picotron-certificate FILE",
}
_COMMAND = {REPORT: "picotron conformance", CERTIFICATE: "picotron conformance verify"}


def plain(value: Any) -> Any:
    """Records as JSON's own types. NaN and infinity, which JSON lacks, become text: "nan"."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, str) else value


def read_document(path: Path, kind: str, *, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object of a file of this kind and format.

    Raises: ConfigError for a file that is not there, too large, of another kind or newer;
        DamagedFileError for one that is no JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise ConfigError(f"There is no file {str(path)!r}. {_nearest(path, kind)}") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder: give the file. {_nearest(path / '_', kind)}"
        ) from None
    if len(content) > largest:
        raise ConfigError(
            f"{path} has more than {largest // 2**20} MiB, which no {kind} has. {_HOW[kind]}"
        )
    try:
        document = json.loads(
            content, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DamagedFileError(f"{path} is no JSON: {reason}. {_HOW[kind]}") from None
    found = document.get("kind") if isinstance(document, dict) else None
    if found != kind:
        other = f" It is a {found}: {_COMMAND[found]} {path}" if found in list(_COMMAND) else ""
        raise ConfigError(f"{path} is no {kind}.{other or ' ' + _HOW[kind]}")
    version = document.get("format")
    if type(version) is not int or version < 1:
        raise DamagedFileError(f"{path}: its format must be a number from 1, found {version!r}.")
    if version > FORMAT:
        raise ConfigError(
            f"{path} has format {version}; this Picotron reads up to {FORMAT}. Upgrade picotron."
        )
    return dict(document)


def parse(path: Path, kind: str, document: Any, record: type[T]) -> T:
    """A document as its record, every field checked. Raises: DamagedFileError for the first."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(record).validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedFileError(
            f"{path} is a {kind} with a wrong field {place!r}: {first['msg'].lower()}, "
            f"found {first['input']!r:.80}. {_HOW[kind]}"
        ) from None


def _nearest(path: Path, kind: str) -> str:
    try:
        names = [other.name for other in path.parent.glob("*.json")][:1000]
    except OSError:
        names = []
    return did_you_mean(path.name, names) if 0 < len(names) <= 12 else _HOW[kind]


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A key that comes twice would show one value to a reader and another to the next."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice in one object")
        found[key] = value
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")
