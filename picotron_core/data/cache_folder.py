"""The folder of the token caches: whose entries count, who builds, and what is swept.

It may be shared by users who do not trust each other, and it may hold things that are not
Picotron's, such as a home directory. So an entry counts only if it belongs to this user, to root or
to the owner of the folder, and only what carries Picotron's name and mark is ever removed.

    <key>/                  an entry: made under another name, and renamed when it is whole
    user-1002/              what user 1002 builds where another user's entry has the name
    .picotron-<key>.lock    held by the process that builds the entry
    .picotron-<key>-<hex>/  an entry that is being built, or that a killed process left
"""

from __future__ import annotations

import errno
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from os import W_OK, access, fstat, listdir, scandir, supports_effective_ids
from os.path import realpath
from pathlib import Path

if sys.platform != "win32":
    import fcntl

from picotron_core.errors import DataError
from picotron_core.files import (
    ForeignOwnerError,
    make_folder,
    new_folder,
    open_lock,
    open_regular,
    opened_folder,
    refuse_owner,
    remove_empty,
    remove_tree,
    remove_within,
    replace_bytes,
    trusted_owners,
    user_id,
)

MARKER, MARK = "picotron.txt", b"Picotron made this folder of tokens. It may be deleted.\n"
UNFINISHED = re.compile(r"\.picotron-([0-9a-f]{32})-[0-9a-f]{16}", re.ASCII)
# How a file system says that it has no locks: Lustre without `-o flock`, NFS without lockd, NFS of
# a lock that another user made, which can be opened for reading only.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
ADVICE = "Delete it, or choose a folder of your own with --data.cache_dir."


def entry_of(cache_dir: Path, key: str) -> Path:
    """The path of this user's entry of `key`, whether it exists or not: a name in `cache_dir`, or
    where the entry of that name belongs to a user who is not trusted, one in this user's part.

    Raises: DataError where the name is taken by something that is no folder; OSError.
    """
    try:
        return _folder_of(cache_dir / key, trusted_owners(cache_dir))
    except ForeignOwnerError:
        return _in_own_part(cache_dir, key)


def own_folder(cache_dir: Path, name: str) -> Path:
    """The path of a folder that this user writes into and nobody else: `name` in `cache_dir`, or in
    this user's part of it where that is another user's.

    Raises: DataError where the name is taken by something that is no folder.
    """
    cache_dir = Path(realpath(cache_dir))
    folder = cache_dir / name
    try:
        _folder_of(folder, trusted_owners(cache_dir))
        if not folder.exists() or _is_writable(folder):
            return folder
    except ForeignOwnerError:
        pass
    except OSError:  # there is no such cache yet, or it cannot be read: writing will tell
        return folder
    return _in_own_part(cache_dir, name)


def _is_writable(folder: Path) -> bool:
    return access(folder, W_OK, effective_ids=access in supports_effective_ids)


def _in_own_part(cache_dir: Path, name: str) -> Path:
    owners = trusted_owners(cache_dir)
    own = cache_dir / f"user-{user_id()}"
    try:
        return _folder_of(_folder_of(own, owners) / name, owners)
    except ForeignOwnerError as error:
        raise DataError(f"{error.filename} {error.strerror}. {ADVICE}") from None


def _folder_of(path: Path, owners: frozenset[int]) -> Path:
    """`path`, if there is nothing or a folder of one of these users."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return path
    refuse_owner(path, status, owners)
    if not stat.S_ISDIR(status.st_mode):
        what = "a link, which is not followed here" if path.is_symlink() else "not a folder"
        raise DataError(f"{path}, in the cache, is {what}. {ADVICE}")
    return path


@contextmanager
def only_builder(folder: Path, key: str, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock of one key, which the kernel releases however its holder ends.

    Yields: whether it is held; not where the file system has no locks. Building is safe without,
        for an entry appears by one rename, but sweeping is not.

    Args:
        on_wait: called before waiting for another process.

    Raises: OSError.
    """
    make_folder(folder)  # it may be this user's part, at its first use
    with open_lock(_lock_of(folder, key)) as lock:
        try:
            _lock(lock, wait=False)
        except BlockingIOError:
            on_wait()
            _lock(lock, wait=True)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            yield False
            return
        yield True


def start_entry(entry: Path) -> Path:
    """Make the folder in which an entry is built, and mark it as Picotron's.

    Others can read what the umask lets them, but never write: their files could not be told from
    this user's.
    """
    making = entry.with_name(f".picotron-{entry.name}-{secrets.token_hex(8)}")
    assert UNFINISHED.fullmatch(making.name)
    new_folder(making, mode=0o755)
    try:
        replace_bytes(making / MARKER, MARK)
    except OSError:
        remove_tree(making)
        raise
    return making


def protect(folder: Path) -> None:
    """Take the right to write from other users, which the umask may have given them."""
    for file in folder.iterdir():
        file.chmod(file.stat().st_mode & ~0o022)


def remove(making: Path) -> None:
    """Remove a folder that `start_entry` made for this user, if it is one; its mark last, so that a
    removal that is cut short can be finished by the next sweep.

    Others may put a link, or another folder, in its place at any time: what is removed is in the
    folder that was looked at, and not in whatever has its name by then.
    """
    with suppress(OSError), opened_folder(making) as folder:
        if not _is_ours(folder):
            return
        for name in listdir(folder):
            if name != MARKER:
                remove_within(folder, name)
        if listdir(folder) == [MARKER]:
            remove_within(folder, MARKER)
            remove_empty(making)


def sweep(folder: Path, key: str) -> None:
    """Remove what killed builders left in `folder`: of this key, whose lock is held, and of others.

    Only folders that `start_entry` made for this user are touched.
    """
    with scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        match = UNFINISHED.fullmatch(name)
        if match is None or not _leads_to_ours(folder / name):
            continue
        if match[1] == key:
            remove(folder / name)
            continue
        with suppress(OSError), open_lock(_lock_of(folder, match[1])) as lock:
            _lock(lock, wait=False)  # fails where its builder lives
            remove(folder / name)


def _leads_to_ours(path: Path) -> bool:
    with suppress(OSError), opened_folder(path) as folder:
        return _is_ours(folder)
    return False


def _is_ours(folder: int) -> bool:
    """Whether an open folder is this user's and carries Picotron's mark."""
    if fstat(folder).st_uid != user_id():
        return False
    with open_regular(Path(MARKER), within=folder) as marker:
        return marker.read(len(MARK) + 1) == MARK


def _lock_of(folder: Path, key: str) -> Path:
    return folder / f".picotron-{key}.lock"


def _lock(lock: FileIO, *, wait: bool) -> None:
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, "this system has no such locks")
    fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
