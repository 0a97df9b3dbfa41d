"""Plugins are tried in a child process before this one touches them, and what is found is kept.

A verdict is a small JSON file, named by a hash of all that it depends on: the files of the plugin's
distribution, torch, CUDA, the driver, the device, and what was asked. So an upgrade of any of them
is tried anew, and all else costs one look at a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Any

from picotron_core.errors import RunError
from picotron_core.files import (
    ForeignOwnerError,
    create,
    make_folder,
    open_lock,
    open_regular,
    remove_file,
    replace_text,
    trusted_owners,
)
from picotron_core.hardware import driver_version
from picotron_core.registry.sources import digest, distribution_files, package_of
from picotron_core.registry.trial import PATIENCE_S, Task, is_passing, try_import, try_kernels
from picotron_core.registry.types import Candidate, Code, Reason, Request

Used = tuple[Candidate, tuple[Request, ...]]  # a backend and what is asked of it
Agree = Callable[[str, str], str]  # (what, this rank's evidence) -> the evidence of all ranks
log = logging.getLogger("picotron")
FIX = (
    "Update {distribution}, or report it to its authors; `picotron quarantine clear {plugin}` has "
    "it tried again"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A verdict as it is kept. evidence: "" for what passed."""

    plugin: str
    distribution: str
    version: str
    what: str  # "its import", or "norm=acme/fast"
    evidence: str
    when: str  # ISO 8601, UTC


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Verdicts in `folder`. agree: makes those of all ranks one, so that all choose alike.
    index: of the CUDA device to try on.

    A file in the folder that belongs to a user who is not trusted is ignored, with a warning: it
    could keep a plugin from being used, or from being tried.
    """

    folder: Path
    agree: Agree = lambda what, evidence: evidence
    patience_s: float = PATIENCE_S
    index: int = 0
    _passing: dict[str, Entry] = field(default_factory=dict)  # verdicts of this process alone

    def plugin(self, point: EntryPoint) -> str:
        """Why a plugin must not be imported; "" where it may. Tries it if nobody has yet."""
        package = point.module.partition(".")[0]
        files = _files(_entry(point).distribution, package)
        key = _key(files, {"import": point.name})
        known = self._known(key)
        if known is None:
            with self.alone():
                known = self._known(key)
                if known is None:
                    evidence = try_import(point.name, patience_s=self.patience_s, index=self.index)
                    known = self.keep(key, _entry(point), evidence)
        return self.agree(f"the import of {point.name}", known.evidence)

    def kernels(self, wanted: Sequence[Used]) -> None:
        """Try kernels that nobody has tried yet, those of one plugin in one child."""
        foreign = [used for used in wanted if is_foreign(used[0])]
        if all(self._known(kernel_key(*used)) for used in foreign):
            return
        with self.alone():  # or every rank of this machine would try the same
            by_plugin: dict[str, dict[Task, Used]] = {}
            for used in foreign:
                if self._known(kernel_key(*used)) is None:
                    by_plugin.setdefault(used[0].provider.plugin, {})[_task(*used)] = used
            for plugin, tasks in by_plugin.items():
                found = try_kernels(
                    plugin, list(tasks), patience_s=self.patience_s, index=self.index
                )
                for task, evidence in found.items():
                    self.keep(kernel_key(*tasks[task]), entry_of(tasks[task][0]), evidence)

    def kernel(self, candidate: Candidate, requests: tuple[Request, ...]) -> Reason | None:
        """Why a plugin's kernel must not be used; None where it may, and for every bundled one."""
        if not is_foreign(candidate):
            return None
        self.kernels([(candidate, requests)])
        verdict = self._known(kernel_key(candidate, requests))
        evidence = verdict.evidence if verdict else "its verdict was lost"
        if not evidence:
            return None
        provider = candidate.provider
        fix = FIX.format(distribution=provider.distribution, plugin=provider.plugin)
        return Reason(code=Code.QUARANTINED, detail=f"quarantined: {evidence}", fix=fix)

    def entries(self) -> Iterator[tuple[Path, Entry]]:
        """All that is kept; a file that is no verdict is none of ours."""
        for path in sorted(self.folder.glob("verdict-*.json")):
            entry = self._read(path)
            if entry is not None:
                yield path, entry

    def keep(self, key: str, entry: Entry, evidence: str) -> Entry:
        """Write a verdict down, in place of any before it."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        kept = Entry(entry.plugin, entry.distribution, entry.version, entry.what, evidence, when)
        if is_passing(evidence):
            self._passing[key] = kept
            return kept
        with self._writable():
            self._make()
            replace_text(self._path(key), json.dumps(as_dict(kept), indent=1) + "\n")
        return kept

    def _known(self, key: str) -> Entry | None:
        return self._passing.get(key) or self._read(self._path(key))

    def _read(self, path: Path) -> Entry | None:
        content = self.content(path)
        try:
            fields = json.loads(content or "")
            return Entry(**fields) if all(isinstance(f, str) for f in fields.values()) else None
        except (ValueError, TypeError, AttributeError):  # cut short by a crash, or no verdict
            return None

    def content(self, path: Path) -> str | None:
        """What a file in the folder holds; None where none can be read and trusted."""
        try:
            with open_regular(path, owners=trusted_owners(self.folder)) as file:
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return None
        except ForeignOwnerError as error:
            log.warning("%s is ignored: it %s", path, error.strerror)
        except OSError as error:
            log.warning("%s is ignored: %s", path, error.strerror)
        return None

    def new_file(self, path: Path) -> FileIO:
        """A file in the folder, open for writing, in place of any of its name.

        Raises: RunError.
        """
        with self._writable():
            self._make()
            remove_file(path)
            return create(path)

    def _make(self) -> None:
        make_folder(self.folder.parent)
        make_folder(self.folder, mode=0o755)  # nobody else may write into it, whatever the umask

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"Cannot write {self.folder}, where the trials of plugins are kept: "
                f"{error.strerror}. Give a folder that you can write to with --data.cache_dir."
            ) from None

    def _path(self, key: str) -> Path:
        return self.folder / f"verdict-{key}.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process of this machine at a time."""
        try:
            import fcntl
        except ImportError:  # Windows: each tries for itself
            yield
            return
        with self._writable():
            self._make()
            lock = open_lock(self.folder / "lock")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def is_foreign(candidate: Candidate) -> bool:
    """A plugin's: bundled kernels are tried in this process."""
    return not candidate.provider.bundled


def _task(candidate: Candidate, requests: tuple[Request, ...]) -> Task:
    return Task(candidate.backend.op, candidate.qualified_name, requests)


def _entry(point: EntryPoint) -> Entry:
    dist = point.dist
    name, number = (dist.name, dist.version) if dist else ("unknown", "unknown")
    return Entry(point.name, name, number, f"the import of {point.name}", "", "")


def entry_of(candidate: Candidate) -> Entry:
    """What a verdict about a kernel is headed with."""
    provider = candidate.provider
    what = f"{candidate.backend.op}={candidate.qualified_name}"
    return Entry(provider.plugin, provider.distribution, provider.version, what, "", "")


def as_dict(entry: Entry) -> dict[str, str]:
    """As it is written."""
    return {name: getattr(entry, name) for name in Entry.__slots__}


@cache  # of this process: its files do not change under it
def _files(distribution: str, package: str) -> str:
    return digest(distribution_files(distribution, package))


def kernel_key(candidate: Candidate, requests: tuple[Request, ...]) -> str:
    """What a kernel's verdict is named by."""
    files = _files(candidate.provider.distribution, package_of(candidate))
    device = requests[0].device
    return _key(
        files,
        {
            "kernel": f"{candidate.backend.op}={candidate.qualified_name}",
            "device": repr(device),
            "requires": _required(candidate.backend.requires),
            "asked": sorted(
                f"{r.dtype} {r.training} {sorted(r.features)} {_sizes(r)}" for r in requests
            ),
        },
    )


def _sizes(request: Request) -> list[tuple[str, int]]:
    """Those that a trial has from the request: what killed a run at one batch size must not come
    back at another.
    """
    taken = {name: n for name, n in request.sizes.items() if name not in ("B", "N", "S", "T")}
    return sorted(taken.items()) + [("T", 1)] * (request.sizes.get("T") == 1)


def _required(requires: Sequence[str]) -> dict[str, str]:
    """The versions of what a kernel is built upon; "" for what is not there."""
    found = {}
    for requirement in requires:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _key(files: str, facts: Mapping[str, Any]) -> str:
    software = {name: version(name) for name in ("picotron", "torch")}
    # A shared home: what cannot be imported on a login node may well be on another.
    software |= {"python": platform.python_version(), "machine": platform.machine()}
    software |= {"driver": driver_version()}
    told = json.dumps({"files": files, **software, **facts}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]
