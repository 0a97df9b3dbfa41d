"""The manifest: what makes a folder a checkpoint. Written last, it vouches for every other file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picotron_core.errors import DamagedFileError
from picotron_core.files import crc32

MANIFEST = "manifest.json"
TENSORS = ("model.safetensors", "optimizer.safetensors")
FORMAT = 1


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Vouch for the tensors in `folder`, and for the facts (JSON); nothing is written after it."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "crc32": crc32(folder / name)}
        for name in TENSORS
    }
    manifest = {"format": FORMAT, **facts, "files": files}
    vouched = {"manifest": manifest, "crc32": zlib.crc32(_canonical(manifest))}
    (folder / MANIFEST).write_text(json.dumps(vouched, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint whose every file holds what was written.

    Raises: DamagedFileError that names the file.
    """
    path = folder / MANIFEST
    try:
        vouched = json.loads(path.read_bytes())
        manifest: dict[str, Any] = vouched["manifest"]
        if vouched["crc32"] != zlib.crc32(_canonical(manifest)):
            raise ValueError("its crc32 differs")
        if manifest["format"] == FORMAT:
            written = {name: manifest["files"][name] for name in TENSORS}
        else:
            raise ValueError(f"format {manifest['format']}, this Picotron reads {FORMAT}")
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}).") from None
    for name, entry in written.items():
        file = folder / name
        if not file.is_file() or file.is_symlink():
            raise DamagedFileError(f"{file}, named in the manifest, is missing or not a file.")
        if file.stat().st_size != entry["bytes"] or crc32(file) != entry["crc32"]:
            raise DamagedFileError(f"{file} is damaged.")
    return manifest


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()
