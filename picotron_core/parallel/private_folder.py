"""Temporary folders that no other user can enter, and that are removed at the end of their last
process, whichever that is.

The folder is locked (flock) by the process that makes it, and the locked descriptor is handed to
the processes that it starts: the lock is free exactly when all of them have ended. What is left
after all of them were killed at once is therefore recognised and removed by the next start. The
lock also keeps systemd-tmpfiles from removing old files during a long run.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from picotron_core.errors import RunError
from picotron_core.files import create, open_regular, write_all

PREFIX = "picotron-"
MARKER = ".picotron-temporary"  # names the machine; nothing without it is ever removed
NOBODY = 65534
log = logging.getLogger("picotron")


@dataclass(frozen=True, slots=True)
class PrivateFolder:
    """A folder of mode 0700. lock: the descriptor of the folder that holds its lock."""

    path: Path
    lock: int

    def leave(self) -> None:
        """Give up this process's part of the lock, and remove the folder if no other holds it."""
        with suppress(OSError):
            os.close(self.lock)
        _remove_unlocked(self.path)


@contextmanager
def private_folder() -> Iterator[PrivateFolder]:
    """A new folder for the length of a block.

    Raises: RunError where there is no place for one.
    """
    folder = make_private_folder()
    try:
        yield folder
    finally:
        folder.leave()


def is_private(folder: Path) -> bool:
    """Whether it is a folder of this user, not a link, that no other user can enter."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    owned = found.st_uid == os.geteuid()
    return stat.S_ISDIR(found.st_mode) and owned and not found.st_mode & 0o077


def make_private_folder() -> PrivateFolder:
    """A new folder, for who calls `leave` at the end.

    Raises: RunError where there is no place for one.
    """
    refused = []
    for parent in _parents():
        if reason := _unsafe(parent):
            refused.append(f"{parent} {reason}")
            continue
        _remove_abandoned(parent)
        try:
            folder = _make_in(parent)
        except OSError as error:
            refused.append(f"{parent}: {error.strerror}")
            continue
        if refused:
            log.warning("Temporary files go to %s: %s", parent, "; ".join(refused))
        return folder
    raise RunError(
        f"No place for a private temporary folder: {'; '.join(refused)}. Set TMPDIR to a folder "
        "of your own on a local disk."
    )


def _parents() -> Iterator[Path]:
    """TMPDIR, then the usual places."""
    named = os.environ.get("TMPDIR")
    usual = ("/tmp", "/var/tmp", os.path.expanduser("~"))
    for place in dict.fromkeys((*filter(None, [named]), *usual)):
        yield Path(os.path.realpath(place))


def _unsafe(parent: Path) -> str:
    """Why another user could put a folder of theirs in the place of ours; "" if none could."""
    for folder in (parent, *parent.parents):
        try:
            found = folder.stat()
        except OSError as error:
            return f"cannot be used: {error.strerror}"
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            where = "" if folder == parent else f"is in {folder}, which "
            return f"{where}can be changed by every user (chmod +t {folder} mends that)"
    found = parent.stat()
    # In a user namespace, as of some containers, root's folders show as nobody's.
    owners = (0, os.geteuid(), *([NOBODY] if found.st_mode & stat.S_ISVTX else []))
    return "" if found.st_uid in owners else "belongs to another user"


def _make_in(parent: Path) -> PrivateFolder:
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not is_private(path):  # file systems without permissions
                raise PermissionError(1, "it keeps no permissions of files")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with create(path / MARKER) as file:
                write_all(file, platform.node().encode())
        except OSError:
            os.close(lock)
            raise
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return PrivateFolder(path, lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that were all killed."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX):
                _remove_unlocked(Path(entry.path))


def _remove_unlocked(path: Path) -> None:
    """Remove a folder of ours unless a process holds its lock. On a network disk a lock may not
    show on other machines, so only what was made on this one is removed.
    """
    if not is_private(path):
        return
    with suppress(OSError):
        with open_regular(path / MARKER) as file:
            if file.read(256) != platform.node().encode():
                return
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
