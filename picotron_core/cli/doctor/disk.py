"""The folder that runs go to: how fast it is written, and how much fits."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TRIAL = 64 << 20  # bytes that are written
BLOCK = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    folder: str  # the folder of runs, or the nearest above it that exists
    free_bytes: int = 0
    written_bytes: int = 0  # less than `TRIAL` on a disk that is nearly full
    bytes_per_s: float | None = None
    error: str = ""


def try_disk(runs: Path) -> Disk:
    """Write a file and have the disk hold it. It has no name, or loses it, whatever happens."""
    folder = runs.expanduser().absolute()
    try:
        while not os.path.lexists(folder):
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        size = min(TRIAL, free // 4 // BLOCK * BLOCK)
        with tempfile.TemporaryFile(dir=folder) as file:
            block = os.urandom(BLOCK)  # a disk that compresses must not shine
            start = time.perf_counter()
            for _ in range(size // BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            took = time.perf_counter() - start
    except OSError as error:
        return Disk(folder=str(folder), error=error.strerror or str(error))
    rate = size / took if size else None
    return Disk(folder=str(folder), free_bytes=free, written_bytes=size, bytes_per_s=rate)
