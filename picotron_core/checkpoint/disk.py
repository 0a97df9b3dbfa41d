"""Every call by which a save changes a disk. A test passes one that records, refuses or is slow."""

from __future__ import annotations

import logging
import os
from os.path import lexists
from pathlib import Path

from picotron_core import files

log = logging.getLogger("picotron")


class Disk:
    """The real one."""

    def make_folder(self, path: Path) -> None:
        """Of several ranks that need it, the first makes it. Its parent must be there: a run's
        folder that was deleted meanwhile must not be made again, half empty. It may be no link.
        """
        files.make_folder(path, parents=False)

    def create(self, path: Path) -> int:
        """A descriptor of a new file."""
        return files.create_descriptor(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Append; returns how many bytes were taken."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """Until the disk has the file's bytes; the page cache is then left to the data loader."""
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def fsync_folder(self, path: Path) -> None:
        """Until the disk has the folder's entries."""
        files.fsync(path)

    def rename(self, path: Path, new: Path) -> None:
        files.rename(path, new)

    def remove(self, folder: Path) -> None:
        """A folder with all that is in it, or a link, but not its target; nothing where it is gone
        already. What stays is named: it takes room, but is no checkpoint.
        """
        files.remove_tree(folder)
        if lexists(folder):
            log.warning("%s could not be removed, and takes room", folder)


def write_all(disk: Disk, descriptor: int, data: memoryview) -> None:
    """Append every byte: one write may take fewer."""
    while data:
        data = data[disk.write(descriptor, data) :]
