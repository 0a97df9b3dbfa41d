"""`picotron checkpoint`: what checkpoints a run has, and whether they hold what was written."""

from __future__ import annotations

from math import prod
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from picotron_core.checkpoint.commit import listed, prune
from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.load import Checkpoint, find_checkpoint, open_checkpoint
from picotron_core.checkpoint.manifest import Manifest, read_manifest
from picotron_core.cli.paths import located
from picotron_core.cli.terminal import open_console
from picotron_core.engine.model_record import read_record
from picotron_core.engine.run_directory import RunDirectory, refuse_links
from picotron_core.errors import ConfigError, DamagedFileError

WIDTH = 160  # columns in a pipe


def run_checkpoint(action: str, run: Path, *, keep: int) -> int:
    """Returns the exit code: 1 where `verify` found damage."""
    run, wanted = located(run)
    if action == "inspect":
        _inspect(find_checkpoint(wanted))
        return 0
    given = wanted != run
    folders = [wanted] if given else listed(run / "checkpoints")
    if not folders:
        raise ConfigError(f"{run} holds no checkpoint. `ls runs` shows what runs there are.")
    if action == "prune":
        if given:
            raise ConfigError(f"prune takes a run's folder, not one of its checkpoints: {wanted}.")
        refuse_links(RunDirectory(run))
        return _prune(run / "checkpoints", folders, keep)
    return _list(folders, every_byte=action == "verify")


def _list(folders: list[Path], *, every_byte: bool) -> int:
    table = Table("checkpoint", "tokens", "size", "saved by", "state", box=None, pad_edge=False)
    damaged = 0
    for folder in folders:
        try:
            manifest = _verified(folder) if every_byte else read_manifest(folder)
        except DamagedFileError as error:
            damaged += 1
            table.add_row(escape(folder.name), "", "", "", f"[red]{escape(str(error))}[/]")
            continue
        state = "whole" if every_byte else "not verified"
        size = f"{manifest.bytes / 1e6:.1f} MB"
        by = f"{manifest.layout}"
        table.add_row(escape(folder.name), f"{manifest.tokens:,}", size, by, state)
    console = open_console(width=WIDTH)
    console.print(table)
    if not every_byte:
        console.print("\n`picotron checkpoint verify` reads every byte.")
    return int(every_byte and damaged > 0)


def _verified(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files, and those of its run that it names, are whole.

    Raises: DamagedFileError.
    """
    manifest = open_checkpoint(folder).manifest
    facts = manifest.facts
    if facts.files:
        run = RunDirectory(folder.parent.parent)
        read_record(run, facts.files, eos_id=facts.eos_id, ends=facts.ends)
    return manifest


def _inspect(checkpoint: Checkpoint) -> None:
    manifest: Manifest = checkpoint.manifest
    facts = manifest.facts
    numbers = sum(prod(shape) for shape in manifest.parameters.values())
    rows = {
        "checkpoint": str(checkpoint.folder),
        "progress": f"step {manifest.step}, {manifest.tokens:,} tokens, {manifest.samples:,} "
        f"samples ({facts.global_batch} a step), seed {facts.seed}",
        "saved by": str(manifest.layout),
        "holds": f"{', '.join(manifest.kinds)} of {numbers:,} parameters in "
        f"{len(manifest.parameters)} tensors: {manifest.bytes / 1e6:.1f} MB, every byte verified",
        "loss scale": f"{manifest.loss_scale.value:g}" if manifest.loss_scale else "",
        "data": facts.data,
        "backends": ", ".join(f"{b.op}={b.backend} ({b.dtype})" for b in facts.backends),
        "files": ", ".join(f"{name} {e.bytes:,} B" for name, e in manifest.files.items()),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows.items():
        if text:
            table.add_row(name, escape(text))
    open_console(width=WIDTH).print(table)


def _prune(checkpoints: Path, folders: list[Path], keep: int) -> int:
    prune(Disk(), checkpoints, folders[0], keep=keep, sound=set())
    left = listed(checkpoints)
    gone = [folder.name for folder in folders if folder not in left]
    print(f"removed {', '.join(gone) or 'nothing'}; left {', '.join(f.name for f in left)}")
    return 0
