"""A disk that writes down what is done to it, and what a power cut may leave of that.

The model: data is there for sure once its file was fsynced, a name once its folder was. Of what was
not, any may have come through: a folder as it was or as it is, of a file some of what was added.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from picotron_core.checkpoint.disk import Disk

Operation = tuple[str, Path, object]


class Recorder(Disk):
    """Does everything for real, and keeps the list."""

    def __init__(self) -> None:
        self.log: list[Operation] = []
        self._paths: dict[int, Path] = {}

    def make_folder(self, path):
        super().make_folder(path)
        self.log.append(("make", path, None))

    def create(self, path):
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self.log.append(("create", path, None))
        return descriptor

    def write(self, descriptor, data):
        taken = super().write(descriptor, data)
        self.log.append(("write", self._paths[descriptor], bytes(data[:taken])))
        return taken

    def fsync(self, descriptor):
        super().fsync(descriptor)
        self.log.append(("fsync", self._paths[descriptor], None))

    def fsync_folder(self, path):
        super().fsync_folder(path)
        self.log.append(("fsync", path, None))

    def rename(self, path, new):
        super().rename(path, new)
        self.log.append(("rename", path, new))

    def remove(self, folder):
        super().remove(folder)
        self.log.append(("remove", folder, None))


@dataclass(eq=False)
class File:
    now: bytes = b""
    sure: bytes = b""

    def fsync(self) -> None:
        self.sure = self.now


@dataclass(eq=False)
class Folder:
    now: dict[str, File | Folder] = field(default_factory=dict)
    sure: dict[str, File | Folder] = field(default_factory=dict)

    def fsync(self) -> None:
        self.sure = dict(self.now)


class Model:
    """What a disk holds after some operations below `root`, which was there before."""

    def __init__(self, root: Path) -> None:
        self.root, self.tree = root, Folder()

    def at(self, path: Path) -> File | Folder:
        found: File | Folder = self.tree
        for name in path.relative_to(self.root).parts:
            found = found.now[name]
        return found

    def do(self, operation: Operation) -> None:
        kind, path, more = operation
        if kind == "make":
            folder = self.tree
            for name in path.relative_to(self.root).parts:
                folder = folder.now.setdefault(name, Folder())
        elif kind == "create":
            self.at(path.parent).now[path.name] = File()
        elif kind == "write":
            self.at(path).now += more
        elif kind == "fsync":
            self.at(path).fsync()
        elif kind == "rename":
            self.at(more.parent).now[more.name] = self.at(path.parent).now.pop(path.name)
        elif kind == "remove":
            self.at(path.parent).now.pop(path.name, None)

    def after_a_cut(self, target: Path, chance: random.Random | None = None) -> None:
        """Make in `target` what is left: without `chance` only what is sure."""
        self._leave(self.tree, target, chance)

    def _leave(self, what: File | Folder, target: Path, chance: random.Random | None) -> None:
        came_through = chance is not None and chance.random() < 0.5
        if isinstance(what, File):
            added = what.now[len(what.sure) :] if came_through else b""
            target.write_bytes(
                what.sure + added[: chance.randint(0, len(added))] if added else what.sure
            )
            return
        target.mkdir(parents=True)
        for name, child in (what.now if came_through else what.sure).items():
            self._leave(child, target / name, chance)
