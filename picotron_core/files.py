"""Files that are whole or absent: checksums, durability, replacement."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

BLOCK = 1 << 22


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def fsync(path: Path) -> None:
    """Have the disk hold a file, or the entries of a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write beside and rename: no reader ever meets half a file, and a crash leaves the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")  # ranks may write alike
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
