"""The part of a rendezvous store that heartbeats need, as files in a folder of this machine.

torch's FileStore only appends: heartbeats would grow it for as long as a run lasts. Here each key
is a file, which is overwritten in place, so that a disk that has filled up does not stop them.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from picotron_core.files import open_regular, open_update

ROOM = 4096  # of a value, written at once and padded, so that a later one finds the same blocks
TRIES = 20
PAUSE_S = 0.5


class FolderStore:
    """Has the methods of `torch.distributed.Store` that `Watchdog` calls.

    rank: of the caller; no two callers write the same file.

    Raises: torch's DistError in place of OSError, as a store does that has lost its connection.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def set(self, key: str, value: str) -> None:
        data = value.encode()
        record = b"%08x%08x" % (len(data), zlib.crc32(data)) + data
        try:
            with open_update(self._path(key), mode=0o600) as file:
                file.write(record.ljust(ROOM))
        except OSError as error:
            _lost(error)

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._read(key) is not None for key in keys)

    def get(self, key: str) -> bytes:
        value = self._read(key)
        if value is None:
            _lost(FileNotFoundError(2, "no such key", key))
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
        try:
            with suppress(FileExistsError):
                os.link(self._path(mine), self._path(key))
        except OSError as error:
            _lost(error)
        return self.get(key)

    def clone(self) -> FolderStore:
        """The same, once the folder can be written to again."""
        from torch.distributed import DistError

        while True:
            time.sleep(PAUSE_S)
            with suppress(DistError):
                self.set(f"probe-{self._rank}", "")
                return self

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "-")

    def _read(self, key: str) -> bytes | None:
        """A value; None where there is none. One that is just being written is read again."""
        for _ in range(TRIES):
            try:
                with open_regular(self._path(key)) as file:
                    record = file.readall()
            except FileNotFoundError:
                if self._folder.is_dir():
                    return None
                _lost(FileNotFoundError(2, "was removed", str(self._folder)))
            except OSError as error:
                _lost(error)
            with suppress(ValueError):
                size, crc = int(record[:8], 16), int(record[8:16], 16)
                data = record[16 : 16 + size]
                if len(data) == size and zlib.crc32(data) == crc:
                    return data
            time.sleep(0.001)
        return None


def _lost(error: OSError) -> NoReturn:
    from torch.distributed import DistError

    raise DistError(f"{error.filename}: {error.strerror}") from error
