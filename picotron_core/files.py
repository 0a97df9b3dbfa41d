"""Files that are whole or absent: checksums, durability, replacement."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from io import FileIO
from pathlib import Path

BLOCK = 1 << 22


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def open_regular(path: Path) -> FileIO:
    """Open a file for reading; not what it links to, and no pipe, which would wait for a writer.

    Raises: OSError
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return FileIO(descriptor, "rb")


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
    fsync(temporary)  # else a power cut may keep the rename and lose the text
    temporary.replace(path)
