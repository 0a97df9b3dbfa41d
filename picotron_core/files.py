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
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

BLOCK = 1 << 22
IS_LINK = "is a link, and links are not followed here"
IS_SHARED = "has other names (hard links), under which it would be changed as well"
# Opening a pipe waits for its other end; for a plain file this flag means nothing.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    with path.open("rb", buffering=0) as file:
        return crc32_of(file)


def crc32_of(file: FileIO) -> int:
    """CRC-32 of the bytes of an open file, from where it stands to its end."""
    value = 0
    while block := file.read(BLOCK):
        value = zlib.crc32(block, value)
    return value


class ForeignOwnerError(PermissionError):
    """A file or folder belongs to a user whose files are not trusted here."""


def user_id() -> int:
    """The user whose files this process creates; 0 where the system has no such numbers."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def trusted_owners(folder: Path) -> frozenset[int]:
    """The users whose files in a shared folder count as this user's own: this user, root, and the
    owner of the folder, who could replace everything in it.

    Raises: OSError where there is no such folder.
    """
    return frozenset({user_id(), 0, folder.stat().st_uid})


def refuse_owner(path: Path, status: os.stat_result, owners: Collection[int]) -> None:
    """Raises: ForeignOwnerError where `status`, that of `path`, has an owner not in `owners`."""
    if status.st_uid not in owners:
        whom = f"belongs to user {status.st_uid}, who is neither you, root, nor the folder's owner"
        raise ForeignOwnerError(errno.EPERM, whom, str(path))


def open_regular(
    path: Path, *, owners: Collection[int] | None = None, within: int | None = None
) -> FileIO:
    """Open a file for reading: neither the target of a link nor a pipe, which would wait for a
    writer.

    Args:
        owners: the users to whom it may belong; None for anyone.
        within: the descriptor of the folder in which a relative path is looked for.

    Raises: ForeignOwnerError; OSError.
    """
    file = _regular(path, os.O_RDONLY, "rb", within=within)
    if owners is not None:
        try:
            refuse_owner(path, os.fstat(file.fileno()), owners)
        except ForeignOwnerError:
            file.close()
            raise
    return file


def create(path: Path, *, mode: int = 0o666) -> FileIO:
    """Open a new file for writing.

    Args:
        mode: the permissions, from which the process's umask is taken.

    Raises: FileExistsError where the name is taken, also by a link; OSError.
    """
    return FileIO(create_descriptor(path, mode=mode), "wb")


def create_descriptor(path: Path, *, mode: int = 0o666) -> int:
    """As `create`; returns the descriptor, which the caller closes."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, mode)


def open_append(path: Path, *, mode: int = 0o666) -> FileIO:
    """Open a file for appending, making it where it does not exist.

    Raises: OSError where the name is a link, one of several hard links, a pipe or a folder.
    """
    return _regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, "ab", mode)


def open_update(path: Path, *, mode: int = 0o666) -> FileIO:
    """Open a file for reading and writing with its content kept, making it where it does not
    exist.

    Raises: OSError where the name is a link, one of several hard links, a pipe or a folder.
    """
    return _regular(path, os.O_RDWR | os.O_CREAT, "r+b", mode)


def open_lock(path: Path) -> FileIO:
    """Open a file to take a lock on, making it where it does not exist. One that another user made,
    or that has several names, is opened for reading, which is enough for `flock`.

    Raises: OSError where the name is a link, a pipe or a folder, or the file cannot be opened.
    """
    try:
        return open_update(path)
    except OSError as refused:
        if refused.errno not in (errno.EACCES, errno.EPERM, errno.EMLINK):
            raise
        try:
            return open_regular(path)
        except FileNotFoundError:
            raise refused from None


def open_null() -> int:
    """A descriptor of the null device, for reading and writing."""
    return os.open(os.devnull, os.O_RDWR)


@contextmanager
def replacing(path: Path) -> Iterator[FileIO]:
    """Write a file beside `path`, and rename it to `path` at the end of the block.

    No reader ever sees half a file, and a crash or an exception leaves the old one. A link at
    `path` is replaced; its target is not touched.

    Raises: OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")  # ranks may write alike
    remove_file(temporary)  # of a process of the same number that was killed, or a link
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
    """Make `text` the content of a file, as UTF-8, whole or not at all: see `replacing`. Bytes in
    the names of files that are not UTF-8 are written as they are.
    """
    replace_bytes(path, text.encode("utf-8", "surrogateescape"))


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


def new_folder(path: Path, *, mode: int = 0o777) -> None:
    """Make a folder, and its parents where they do not exist.

    Raises: FileExistsError where the name is taken, also by a link; OSError.
    """
    path.mkdir(mode=mode, parents=True)


def make_folder(path: Path, *, mode: int = 0o777, parents: bool = True) -> None:
    """Make a folder, and its parents unless told otherwise, if it does not exist.

    Raises: OSError where the name is a link or a file.
    """
    path.mkdir(mode=mode, parents=parents, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, IS_LINK, str(path))


def make_link(path: Path, target: Path) -> None:
    """Make a symbolic link to a target.

    Raises: FileExistsError where the name is taken; OSError.
    """
    path.symlink_to(target)


def rename(path: Path, new: Path) -> None:
    """Give a file or a folder another name on the same disk; a file or link at `new` is replaced.

    Raises: OSError.
    """
    path.rename(new)


def remove_file(path: Path) -> None:
    """Remove a file, or a link but not its target; nothing happens where there is nothing.

    Raises: OSError.
    """
    path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder that has nothing in it.

    Raises: OSError.
    """
    folder.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; of a link the link itself. Nothing happens
    where there is nothing, and what cannot be removed stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """The descriptor of a folder, for as long as this lasts: it stays this one's, whatever others
    put in its place.

    Raises: OSError where the name is a link or a file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_within(folder: int, name: str) -> None:
    """As `remove_tree`, of a name in an open folder."""
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:  # systems differ in how they say that it is a folder
        shutil.rmtree(name, ignore_errors=True, dir_fd=folder)


def refuse_links(folder: Path, *names: str) -> None:
    """Check that none of these names in a folder is a link.

    Raises: OSError that names the first that is.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise OSError(errno.ELOOP, IS_LINK, str(folder / name))


def fsync(path: Path) -> None:
    """Have the disk hold a file, or the entries of a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY | _NO_WAIT)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _regular(
    path: Path, flags: int, mode: str, permissions: int = 0o666, *, within: int | None = None
) -> FileIO:
    try:
        descriptor = os.open(path, flags | _NO_WAIT | _NO_LINK, permissions, dir_fd=within)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):  # how systems say "a link"
            raise
        raise OSError(errno.ELOOP, IS_LINK, str(path)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:  # as `cp -al` makes them
        os.close(descriptor)
        raise OSError(errno.EMLINK, IS_SHARED, str(path))
    return FileIO(descriptor, mode)
