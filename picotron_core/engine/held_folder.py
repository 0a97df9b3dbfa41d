"""Folders that must stay where they are while a run trains.

A folder that is deleted in mid-run would otherwise be made again by the next save, half empty; and
where another run has made a new one of the same name, this run would write into that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from picotron_core.errors import RunError


@dataclass(frozen=True, slots=True)
class HeldFolders:
    """Open folders, by their paths. While one is open no other gets its inode number."""

    descriptors: dict[Path, int]

    def refuse_lost(self) -> None:
        """Raises: RunError where a path no longer leads to the folder that was opened."""
        for path, descriptor in self.descriptors.items():
            if not _leads_to(path, descriptor):
                raise RunError(
                    f"{path} is gone: it was deleted, moved or replaced while the run trained, so "
                    "nothing more can be saved there. Move it back and go on with --resume, or "
                    "start again."
                )


@contextmanager
def held_folders(*paths: Path) -> Iterator[HeldFolders]:
    """Know these folders again for as long as this lasts.

    Raises: RunError where one is not there.
    """
    descriptors: dict[Path, int] = {}
    try:
        for path in paths:
            try:
                descriptors[path] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise RunError(f"Cannot open the folder {path}: {error.strerror}.") from None
        yield HeldFolders(descriptors)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
