"""The only module that opens files for writing. Nothing here follows a link.

A run's folder or a cache may have been copied from elsewhere, with links in it that point at the
user's own files. A file is therefore created new, appended to, or replaced by a rename, each time
without following a link at its name; `refuse_links` asks the same of the folders above it.
`tests/unit/test_files.py` searches the code for any other way of writing.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

BLOCK = 1 << 22
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def open_regular(path: Path) -> FileIO:
    """Open a file for reading: neither the target of a link nor a pipe, which would wait for a
    writer.

    Raises: OSError.
    """
    return _regular(path, os.O_RDONLY, "rb")


def create(path: Path, *, mode: int = 0o666) -> FileIO:
    """Open a new file for writing.

    Args:
        mode: the permissions, from which the process's umask is taken.

    Raises: FileExistsError where the name is taken, also by a link; OSError.
    """
    return FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, mode), "wb")


def open_append(path: Path, *, mode: int = 0o666) -> FileIO:
    """Open a file for appending, making it where it does not exist.

    Raises: OSError where the name is a link, a pipe or a folder.
    """
    return _regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, "ab", mode)


def open_update(path: Path, *, mode: int = 0o666) -> FileIO:
    """Open a file for reading and writing with its content kept, making it where it does not
    exist: what a lock is taken on.

    Raises: OSError where the name is a link, a pipe or a folder.
    """
    return _regular(path, os.O_RDWR | os.O_CREAT, "r+b", mode)


@contextmanager
def replacing(path: Path) -> Iterator[FileIO]:
    """Write a file beside `path`, and rename it to `path` at the end of the block.

    No reader ever sees half a file, and a crash or an exception leaves the old one. A link at
    `path` is replaced; its target is not touched.

    Raises: OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")  # ranks may write alike
    with suppress(FileNotFoundError):
        temporary.unlink()  # of a process of the same number that was killed, or a link
    with create(temporary) as file:
        try:
            yield file
            os.fsync(file.fileno())  # else a power cut may keep the rename and lose the content
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def replace_bytes(path: Path, data: bytes) -> None:
    """Make `data` the content of a file, whole or not at all: see `replacing`."""
    with replacing(path) as file:
        write_all(file, data)


def replace_text(path: Path, text: str) -> None:
    """Make `text` the content of a file, as UTF-8, whole or not at all: see `replacing`."""
    replace_bytes(path, text.encode())


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write every byte: a write of the system may take fewer, and a full disk takes none."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a plain file to `target`, which is replaced.

    Raises: OSError, also where `source` is a link or a pipe.
    """
    with open_regular(source) as read, replacing(target) as written:
        while block := read.read(BLOCK):
            write_all(written, block)


def make_folder(path: Path, *, mode: int = 0o777) -> None:
    """Make a folder and its parents, if it does not exist.

    Raises: OSError where the name is a link or a file.
    """
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link, and links are not followed here", str(path))


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; of a link the link itself. Nothing happens
    where there is nothing, and what cannot be removed stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def refuse_links(folder: Path, *names: str) -> None:
    """Check that none of these names in a folder is a link.

    Raises: OSError that names the first that is.
    """
    for name in names:
        if (folder / name).is_symlink():
            message = "is a link, and links in a run's folder are not followed"
            raise OSError(errno.ELOOP, message, str(folder / name))


def fsync(path: Path) -> None:
    """Have the disk hold a file, or the entries of a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _regular(path: Path, flags: int, mode: str, permissions: int = 0o666) -> FileIO:
    # O_NONBLOCK: opening a pipe waits for its other end; for a plain file it means nothing.
    flags |= getattr(os, "O_NONBLOCK", 0) | _NO_LINK
    descriptor = os.open(path, flags, permissions)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return FileIO(descriptor, mode)
