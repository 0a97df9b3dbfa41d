"""Data that can be read only once: standard input and pipes, copied to an unnamed file."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from picotron_core import files
from picotron_core.data.streams import BLOCK, Stored, printable
from picotron_core.errors import DataError

STDIN = "-"


def stored_at(name: str, *, keep_in: Path | None, ranks: int) -> Stored:
    """The bytes that a user named, of a kind that can be read again.

    Args:
        name: a path that exists and is no folder, or "-" for standard input.
        keep_in: the folder for the copy of a pipe; None: that of temporary files.
        ranks: how many processes would read it.

    Raises: DataError for a device, a terminal, a socket, or a pipe that several ranks would read.
    """
    path = Path("/dev/stdin" if name == STDIN else name).expanduser()
    shown = "standard input (-)" if name == STDIN else printable(name)
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode if name == STDIN else path.stat().st_mode
    except (OSError, ValueError, AttributeError) as error:  # closed, or not a file at all
        raise DataError(f"Cannot read {shown}: {error}. Check --data.paths.") from None
    if stat.S_ISREG(mode):
        return Stored(path)
    if not stat.S_ISFIFO(mode):
        what = "a terminal" if name == STDIN and sys.stdin.isatty() else "a device or socket"
        raise DataError(
            f"{shown} is {what}, which has no end. Name files, folders or a pipe with --data.paths."
        )
    if ranks > 1:
        raise DataError(only_once(shown, ranks))
    source = sys.stdin.fileno() if name == STDIN else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Stored(path, _kept(iter(lambda: os.read(source, BLOCK), b""), keep_in))
    finally:
        if name != STDIN:
            os.close(source)


def only_once(shown: str, ranks: int) -> str:
    """The error for a pipe that several ranks would read."""
    return (
        f"{shown} is a pipe, which can be read only once, but {ranks} ranks would read it. Write "
        "its content to a file, and name that with --data.paths."
    )


def unpacked(stored: Stored, blocks: Iterable[bytes], keep_in: Path | None) -> Stored:
    """The decompressed content of a file whose format is read at random places."""
    return Stored(stored.path, _kept(blocks, keep_in))


def _kept(blocks: Iterable[bytes], folder: Path | None) -> int:
    """Copy these bytes to a file that has no name any more; returns its descriptor.

    The system frees the space when the process ends, however it ends.
    """
    folder = Path(os.path.realpath(folder or tempfile.gettempdir()))  # it may lie behind a link
    try:
        files.make_folder(folder)
        made = Path(tempfile.mkdtemp(prefix=".pipe.", dir=folder))
        try:
            with files.create(made / "content", mode=0o600) as file:
                descriptor = os.open(made / "content", os.O_RDONLY | os.O_CLOEXEC)
                shutil.rmtree(made)
                for block in blocks:
                    files.write_all(file, block)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # of what is decompressed, not of the disk
            raise
        raise DataError(
            f"Cannot keep a copy of a pipe's data in {printable(folder)}: "
            f"{error.strerror or error}. Free space there, or choose another folder with "
            "--data.cache_dir."
        ) from None
    return descriptor
