"""Which plugin's kernel killed a run: known to the next start.

A kernel that passed its trial may still kill a process, by shapes that the trial did not have.
While a run uses plugins' kernels it keeps a breadcrumb: who they are, and a file that Python's
fault handler writes to as the process dies of a signal.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from picotron_core.files import remove_file, replace_text
from picotron_core.registry.quarantine import (
    Entry,
    Quarantine,
    Used,
    as_dict,
    entry_of,
    is_foreign,
    kernel_key,
)
from picotron_core.registry.sources import package_of


@contextmanager
def breadcrumb(quarantine: Quarantine, used: Sequence[Used]) -> Iterator[None]:
    """Left behind if the process dies within; gone once this is left, by whatever way."""
    suspects = [
        {
            "key": kernel_key(*kernel),
            "package": package_of(kernel[0]),
            "entry": as_dict(entry_of(kernel[0])),
        }
        for kernel in used
        if is_foreign(kernel[0])
    ]
    if not suspects:
        yield
        return
    crumb = quarantine.folder / f"{_prefix()}{os.getpid()}.json"
    faults = crumb.with_suffix(".faults")
    before = faulthandler.is_enabled()
    with quarantine.new_file(faults) as file:
        replace_text(crumb, json.dumps({"process": _process(os.getpid()), "used": suspects}))
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            if before:
                faulthandler.enable()
            remove_file(crumb)
    remove_file(faults)


def sweep(quarantine: Quarantine) -> list[str]:
    """Judge by the breadcrumbs of processes that are gone; a sentence for each kernel accused.

    One that left no word was killed from outside, or lost its power: that accuses nobody.
    """
    if not _crumbs(quarantine):
        return []
    with quarantine.alone():  # or two ranks would judge by the same
        return [
            told for crumb, pid in _crumbs(quarantine) for told in _judge(quarantine, crumb, pid)
        ]


def _crumbs(quarantine: Quarantine) -> list[tuple[Path, int]]:
    """This machine's, with the number of the process that left each."""
    name = re.compile(re.escape(_prefix()) + r"(\d+)\.json")
    found = [(path, name.fullmatch(path.name)) for path in sorted(quarantine.folder.glob("run*"))]
    return [(path, int(match[1])) for path, match in found if match]


def _judge(quarantine: Quarantine, crumb: Path, pid: int) -> Iterator[str]:
    """Judge by one breadcrumb, if its process is gone, and remove it."""
    content = quarantine.content(crumb)
    if content is None:  # its run has just ended, or another user left it
        return
    try:
        left = json.loads(content)
        process, used = left["process"], left["used"]
    except (ValueError, KeyError, TypeError):  # cut short, as by a loss of power: accuses nobody
        process, used = "unknown", []
    if process != _process(pid):
        faults = crumb.with_suffix(".faults")
        text = quarantine.content(faults) or ""
        for suspect in _culprits(used, text):
            entry = Entry(**suspect["entry"])
            evidence = f"it killed a run: {_fault(text, suspect['package'])}"
            quarantine.keep(suspect["key"], entry, evidence)
            yield f"{entry.what} is quarantined: {evidence}"
        for path in (crumb, faults):
            remove_file(path)


def _prefix() -> str:
    """A folder that machines share holds crumbs of them all; each can tell only of its own."""
    return f"running-{platform.node()}-"


def _culprits(used: Sequence[dict[str, Any]], faults: str) -> Sequence[dict[str, Any]]:
    """Those in whose files the process died; all, where the fault was in none of them. But an
    abort is a library's decision, as NCCL's when another rank is gone: it needs a frame.
    """
    if not faults:
        return ()
    accused = [one for one in used if _frame(faults, one["package"])]
    return accused if accused or "Aborted" in faults.splitlines()[0] else used


def _frame(faults: str, package: str) -> re.Match[str] | None:
    """The innermost frame in a package's files: those of a thread come with the last call first."""
    return re.search(rf'File "([^"]*\b{re.escape(package)}\b[^"]*)", line (\d+) in (\w+)', faults)


def _fault(faults: str, package: str) -> str:
    """The first line of the fault handler's account, and where in the package it was."""
    head = faults.splitlines()[0].removeprefix("Fatal Python error: ")
    frame = _frame(faults, package)
    return head if frame is None else f"{head} in {frame[3]} ({Path(frame[1]).name}:{frame[2]})"


def _process(pid: int) -> str:
    """Who a process is, for numbers come again; "" where it is gone."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            text = stat.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # Its start in clock ticks since boot: field 22, behind the name, which may hold spaces.
        return f"{pid} {text.rpartition(')')[2].split()[19]} {boot}"
    try:  # not Linux: the number has to do
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # it is somebody else's
    return str(pid)
