"""Checkpoints that their manifest vouches for, whatever is in them: what an attacker can write."""

import json
import zlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FILE = "rank-00000.safetensors"


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())["manifest"]


def write_manifest(folder: Path, manifest: Any) -> None:
    """As it is, with the checksum that belongs to it."""
    canonical = json.dumps(manifest, sort_keys=True).encode()
    vouched = {"manifest": manifest, "crc32": zlib.crc32(canonical)}
    (folder / MANIFEST).write_text(json.dumps(vouched, indent=1))


def write_file(folder: Path, content: bytes, name: str = FILE) -> None:
    """A file, and a manifest that vouches for it."""
    (folder / name).write_bytes(content)
    manifest = manifest_of(folder)
    manifest["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    write_manifest(folder, manifest)


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and the numbers."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(header: Any, numbers: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers
