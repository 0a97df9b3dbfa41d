"""Write one rank's file: in chunks, at a bounded rate, counting its checksum on the way."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from picotron_core.checkpoint.disk import Disk, write_all
from picotron_core.checkpoint.manifest import FileEntry
from picotron_core.errors import NotFiniteError

CHUNK = 1 << 20  # numbers: 4 MiB
SYNC_BYTES = 64 << 20  # dirty bytes that may pile up: a disk that must take more at once stalls all


def write_file(
    disk: Disk,
    path: Path,
    header: bytes,
    tensors: Iterable[Tensor],
    *,
    max_mb_per_s: float = 0.0,
    hurry: Event | None = None,
) -> FileEntry:
    """Header and float32 numbers into a new file, durable on return.

    Args:
        tensors: flat, on any device; one chunk of them is copied to the host at a time.
        max_mb_per_s: megabytes a second at most; 0 is as fast as the disk takes them.
        hurry: once set, so is any other rate.

    Raises: OSError; NotFiniteError for a number that is infinite or NaN: it must not be resumed.
    """
    entry = FileEntry(bytes=0, crc32=0)
    hurry = hurry or Event()
    begin, synced = time.monotonic(), 0
    descriptor = disk.create(path)
    try:
        for data in _bytes(header, tensors):
            write_all(disk, descriptor, data)
            entry = FileEntry(bytes=entry.bytes + len(data), crc32=zlib.crc32(data, entry.crc32))
            if entry.bytes - synced >= SYNC_BYTES:
                disk.fsync(descriptor)
                synced = entry.bytes
            if max_mb_per_s:
                due = begin + entry.bytes / (max_mb_per_s * 1e6)
                hurry.wait(max(0.0, due - time.monotonic()))
        disk.fsync(descriptor)
    finally:
        disk.close(descriptor)
    return entry


def _bytes(header: bytes, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors:
        for start in range(0, len(tensor), CHUNK):
            here = tensor[start : start + CHUNK].cpu()
            if not all(math.isfinite(edge) for edge in torch.stack(here.aminmax()).tolist()):
                raise NotFiniteError("a parameter or a moment is infinite or NaN")
            yield here.view(torch.uint8).numpy().data
