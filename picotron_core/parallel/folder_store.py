"""The part of a rendezvous store that heartbeats need, as files in a folder of this machine.

torch's FileStore only appends: heartbeats would grow it for as long as a run lasts. Here each key
is a file, which is overwritten in place, so that a disk that has filled up does not stop them.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from picotron_core.files import open_regular, open_update

ROOM = 4096  # of a value, written at once and padded, so that a later one finds the same blocks
TRIES = 20
PAUSE_S = 0.5


def write_value(folder: Path, key: str, value: str) -> None:
    """Raises: OSError."""
    data = value.encode()
    record = b"%08x%08x" % (len(data), zlib.crc32(data)) + data
    with open_update(_path(folder, key), mode=0o600) as file:
        file.write(record.ljust(ROOM))


def read_value(folder: Path, key: str) -> bytes | None:
    """A value; None where there is none. One that is just being written is read again.

    Raises: OSError, also where the folder is gone.
    """
    for _ in range(TRIES):
        try:
            with open_regular(_path(folder, key)) as file:
                record = file.readall()
        except FileNotFoundError:
            folder.stat()
            return None
        with suppress(ValueError):
            size, crc = int(record[:8], 16), int(record[8:16], 16)
            data = record[16 : 16 + size]
            if len(data) == size and zlib.crc32(data) == crc:
                return data
        time.sleep(0.001)
    return None


class FolderStore:
    """Has the methods of `torch.distributed.Store` that `Watchdog` calls. They raise torch's
    DistError in place of OSError, as a store does that has lost its connection.

    rank: of the caller; no two callers write the same file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def set(self, key: str, value: str) -> None:
        with _as_lost():
            write_value(self._folder, key, value)

    def check(self, keys: Sequence[str]) -> bool:
        with _as_lost():
            return all(read_value(self._folder, key) is not None for key in keys)

    def get(self, key: str) -> bytes:
        with _as_lost():
            value = read_value(self._folder, key)
            if value is None:
                raise FileNotFoundError(2, "No such key", key)
            return value

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Only for `expected` == "": set what is not set yet, whoever comes first."""
        assert not expected
        if self.check([key]):
            return self.get(key)
        mine = f"{key}-{self._rank}"
        self.set(mine, desired)
        with _as_lost(), suppress(FileExistsError):
            os.link(_path(self._folder, mine), _path(self._folder, key))
        return self.get(key)

    def clone(self) -> FolderStore:
        """The same, once the folder can be written to again."""
        while True:
            time.sleep(PAUSE_S)
            with suppress(OSError):
                write_value(self._folder, f"probe-{self._rank}", "")
                return self


def _path(folder: Path, key: str) -> Path:
    return folder / key.replace("/", "-")


@contextmanager
def _as_lost() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except OSError as error:
        raise DistError(f"{error.filename}: {error.strerror}") from error
