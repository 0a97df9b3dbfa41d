"""Nobody trains in a run's folder in which another process trains.

The first rank holds a lock of the kernel's on a file in the folder. It goes when its holder ends,
even by kill -9, if not at once: a large process gives its memory back first, and for a machine that
lost power a file server keeps it a minute or two. The file stays, and says nothing by being there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError, RunError
from picotron_core.files import open_update, remove_empty, remove_file

# A file system says by these that it has no locks: Lustre without `-o flock`, NFS without lockd.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
LOOK_S = 0.2  # between two tries
TOLD_CHARS = 200  # of what a lock says: the file may be anybody's

log = logging.getLogger("picotron")
_held: dict[Path, FileIO] = {}  # by this process


@contextmanager
def alone_in(run: RunDirectory, *, patience_s: float = 0.0) -> Iterator[None]:
    """Keep other processes from training in a run's folder.

    Args:
        patience_s: how long one that trains there is waited for.

    Raises: ConfigError where one trains there; RunError where the lock's file cannot be written.
    """
    _held[run.lock] = _locked(run, patience_s)
    try:
        yield
    finally:
        if file := _held.pop(run.lock, None):
            file.close()


def remove_unused(run: RunDirectory) -> None:
    """Remove the folder of a run that did not begin, if it holds nothing but this process's lock.

    Whoever waits to open that file finds out, and makes another: see `_locked`.
    """
    with suppress(OSError):  # not empty: something worth keeping was written
        if run.lock in _held and [*run.path.iterdir()] == [run.lock]:
            remove_file(run.lock)
            _held.pop(run.lock).close()  # or NFS would keep it, and so the folder
        remove_empty(run.path)


def _locked(run: RunDirectory, patience_s: float) -> FileIO:
    """The lock's file, locked for as long as it is open."""
    end, told = time.monotonic() + patience_s, False
    while True:
        try:
            file = open_update(run.lock)
        except OSError as error:
            raise _not_written(run, error) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(run.lock, file):
                _sign(file)
                return file
        except BlockingIOError:
            holder = _told_by(file)
            file.close()
            if time.monotonic() < end:
                if not told:
                    log.info(
                        "%s is locked by %s: waiting up to %.0f s", run.path, holder, patience_s
                    )
                told = True
                time.sleep(LOOK_S)
                continue
            raise ConfigError(
                f"Another process trains in {run.path}: {holder}. Two would ruin the run. Wait "
                "until it has ended, or end it there (on SIGTERM it saves first); then start this "
                "again."
            ) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                log.warning(
                    "%s cannot be locked (%s): see to it yourself that no two processes train in "
                    "that folder at a time",
                    *(run.lock, error.strerror),
                )
                return file
            file.close()
            raise _not_written(run, error) from None
        file.close()  # removed since it was opened, by a start that failed: nobody else sees it


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sign(file: FileIO) -> None:
    """Say who holds it, and have the disk hold that: it may be read on another machine."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
    os.fsync(file.fileno())


def _told_by(file: FileIO) -> str:
    """Who holds it; it may be about to sign."""
    told = file.read(TOLD_CHARS).decode(errors="replace").strip()
    return told if told and told.isprintable() else "it has not yet said which"


def _not_written(run: RunDirectory, error: OSError) -> RunError:
    return RunError(
        f"Cannot lock {run.lock}: {error.strerror}. Free space or make it a file that you can "
        "write to, or copy the run's folder and go on with the copy."
    )


def _let_go() -> None:
    """A lock lasts while any process has its file open: a fork must not outlast the rank with it.
    It is closed, not unlocked, which would unlock it for the rank as well.
    """
    for file in _held.values():
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
