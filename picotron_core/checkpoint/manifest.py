"""The manifest: what makes a folder a checkpoint. Written last, it vouches for every other file."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from picotron_core.errors import DamagedFileError

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 22


def describe_files(folder: Path) -> dict[str, dict[str, int]]:
    """File name -> its size and CRC-32, for every file but the manifest."""
    return {
        path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file holds what was written.

    Raises: DamagedFileError that names the file.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        written = {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items()}
        version = manifest["format"]
    except FileNotFoundError:
        raise DamagedFileError(f"{folder} has no {MANIFEST}: it is no whole checkpoint.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}). Use another checkpoint.") from None
    if version != FORMAT:
        raise DamagedFileError(f"{path} has format {version}, this Picotron reads {FORMAT}.")
    for name, (size, crc32) in written.items():
        file = folder / name
        if Path(name).name != name or not file.is_file() or file.is_symlink():
            raise DamagedFileError(f"{file}, named in the manifest, is missing or not a file.")
        if file.stat().st_size != size or _crc32(file) != crc32:
            raise DamagedFileError(f"{file} is damaged. Use another checkpoint of the run.")
    return dict(manifest)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
