"""What one rank does when all have written: vouch, make visible, and only then let old ones go."""

from __future__ import annotations

import logging
import re
from os.path import lexists
from pathlib import Path

from picotron_core.checkpoint import manifest as manifests
from picotron_core.checkpoint.disk import Disk, write_all
from picotron_core.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify
from picotron_core.errors import DamagedFileError, RunError

TEMPORARY = ".writing-"  # a folder so named is never read, and swept by the next run
CHECKPOINTS = "checkpoints"  # the folder of a run
NAME = r"step-\d{8,18}"
log = logging.getLogger("picotron")


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def temporary_of(checkpoints: Path, step: int, run: str, number: int) -> Path:
    """Args:
    run: this process's own word: ranks of a killed run may still be writing.
    number: of the save, of those of one step that are tried one after the other.
    """
    return checkpoints / f"{TEMPORARY}step-{step:08d}-{run}-{number}"


def sweep(disk: Disk, checkpoints: Path) -> None:
    """Remove what killed or failed saves left. A rank may call it while nobody writes."""
    for stale in checkpoints.glob(f"{TEMPORARY}*"):
        disk.remove(stale)


def discard(disk: Disk, temporary: Path) -> None:
    """Remove what one save left: its own folder, and the checkpoint of its step from before."""
    for left in (temporary, _replaced_by(temporary)):
        disk.remove(left)


def _replaced_by(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}-replaced")


def commit(disk: Disk, temporary: Path, final: Path, manifest: Manifest) -> None:
    """Make of a folder of durable files a checkpoint.

    Raises: OSError; RunError where the files of other ranks are not here.
    """
    for name, entry in manifest.files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise RunError(
                f"{name} was written, but is not in {temporary.parent}: every rank must see the "
                "same files. Put --run.dir on a disk that all machines share."
            )
    descriptor = disk.create(temporary / MANIFEST)
    try:
        write_all(disk, descriptor, memoryview(manifests.encode(manifest)))
        disk.fsync(descriptor)
    finally:
        disk.close(descriptor)
    disk.fsync_folder(temporary)
    replaced = _replaced_by(temporary)
    if lexists(final):  # of a run that went on from an earlier one, which is still there
        disk.rename(final, replaced)
    try:
        disk.rename(temporary, final)
    except OSError:
        if lexists(replaced):
            disk.rename(replaced, final)
        raise
    for folder in (final.parent, final.parent.parent):  # the first save made the one in the other
        disk.fsync_folder(folder)


def prune(disk: Disk, checkpoints: Path, newest: Path, *, keep: int, sound: set[str]) -> None:
    """Remove all but the newest `keep` whole checkpoints up to `newest`, and those of later steps:
    they belong to a future that resuming from an earlier one has given up. What is named otherwise,
    and links, are the user's.

    Args:
        sound: names of those known to be whole; the others are read before anything older goes.
    """
    kept, gone = 0, {}
    for path in listed(checkpoints):
        if path.is_symlink():
            continue
        if step_of(path) > step_of(newest) or kept >= keep:
            gone[path.name] = path.with_name(f"{TEMPORARY}{path.name}-old")
            disk.remove(gone[path.name])  # of a removal that was cut short
            disk.rename(path, gone[path.name])
        elif path.name in sound or _is_whole(path):
            sound.add(path.name)
            kept += 1
    if gone:
        # Names go before files do: a kill or a power cut must not leave half a checkpoint.
        disk.fsync_folder(checkpoints)
        for folder in gone.values():
            disk.remove(folder)
        log.info("removed %s: %d newer ones are kept", ", ".join(gone), kept)


def _is_whole(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
        refuse_other_step(folder, manifest)
        verify(folder, manifest)
    except DamagedFileError as error:
        log.warning("%s It does not count as kept.", error)
        return False
    return True


def refuse_other_step(folder: Path, manifest: Manifest) -> None:
    """Raises: DamagedFileError where a folder is named after another step than it holds."""
    if is_named(folder) and step_of(folder) != manifest.step:
        raise DamagedFileError(
            f"{folder / MANIFEST} is of step {manifest.step}: the folder was renamed or copied."
        )


def listed(checkpoints: Path) -> list[Path]:
    """The folders that may be checkpoints, the newest step first."""
    return sorted(filter(is_named, checkpoints.glob("step-*")), key=step_of, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a path that was given means a checkpoint, and not a run in a folder of that name."""
    return path.parent.name == CHECKPOINTS and not (path / "config.toml").exists()


def is_named(folder: Path) -> bool:
    """Whether it has the name of a checkpoint, which nothing else in the folder may count as."""
    return bool(re.fullmatch(NAME, folder.name, re.ASCII))


def step_of(folder: Path) -> int:
    """Of one that `is_named`."""
    return int(folder.name.removeprefix("step-"))
