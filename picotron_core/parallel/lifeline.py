"""Processes that do not outlive the one that started them, and the folder that they share with it.

Each child inherits the reading end of a pipe whose writing end only its starter has. However the
starter ends, kill -9 included, the pipe is then closed. The child notices, stops as for SIGTERM
(a run is saved), and the last one to end removes the folder.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from picotron_core.parallel.folder_store import read_value
from picotron_core.parallel.private_folder import PrivateFolder, is_private, private_folder
from picotron_core.parallel.seen import Seen

# In a child's environment: descriptor of the pipe, descriptor of the folder's lock, folder.
VARIABLE = "LAUNCHER_LIFELINE"
LOOK_S = 0.2
PR_SET_PDEATHSIG = 1
WITHOUT_LIMIT_S = 600.0  # what a child may take to end where it has not said


@dataclass(frozen=True, slots=True)
class Starter:
    """What a process that starts others gives to them: see `subprocess.Popen`."""

    folder: PrivateFolder
    pipe: int

    @property
    def variables(self) -> dict[str, str]:
        return {VARIABLE: f"{self.pipe}:{self.folder.lock}:{self.folder.path}"}

    @property
    def descriptors(self) -> tuple[int, int]:
        """For `pass_fds`."""
        return self.pipe, self.folder.lock


@contextmanager
def starter() -> Iterator[Starter]:
    """For the length of a block this process can start others, and has a folder with them."""
    with private_folder() as folder:
        read, write = os.pipe()
        try:
            yield Starter(folder, read)
        finally:
            os.close(read)
            os.close(write)


@dataclass(slots=True)
class Lifeline:
    """A child's side.

    patience_s: how long it may take to end once its starter is gone.
    quiet: another child says that the starter is gone.
    """

    folder: PrivateFolder
    pipe: int
    patience_s: float = WITHOUT_LIMIT_S
    quiet: bool = False
    cut: bool = False
    _ended: Event = field(default_factory=Event)

    def is_cut(self) -> bool:
        """Whether the starter is gone."""
        if not self.cut:
            ready, _, _ = select.select([self.pipe], [], [], 0)
            self.cut = bool(ready)
        return self.cut

    def watch(self) -> None:
        """Called once, by the main thread."""
        _be_continued_at_its_death()
        atexit.register(self.leave)
        Thread(target=self._watch, daemon=True).start()

    def leave(self) -> None:
        """The last act of a process whose starter can no longer remove the folder."""
        self._ended.set()
        if self.is_cut():
            self.folder.leave()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            if self.is_cut():
                self._stop()
                return

    def _continue_others(self) -> None:
        """Ranks that are stopped (SIGSTOP) notice nothing until they are continued."""
        with suppress(OSError):
            for path in self.folder.path.glob("alive-*"):
                if heart := read_value(self.folder.path, path.name):
                    Seen.of(heart, silent=True).wake()

    def _stop(self) -> None:
        self._continue_others()
        if not self.quiet:
            words = "The process that started this one is gone: stopping as for SIGTERM.\n"
            with suppress(OSError):
                os.write(2, f"error: {words}".encode())
        if callable(signal.getsignal(signal.SIGTERM)):
            os.kill(os.getpid(), signal.SIGTERM)  # which saves
            end = time.monotonic() + self.patience_s
            while time.monotonic() < end:
                if self._ended.wait(LOOK_S):
                    return
        end_now(1)


def _be_continued_at_its_death() -> None:
    """On Linux the kernel itself continues this process, if it is stopped when its parent dies."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


_attached: list[Lifeline] = []


def attach() -> Lifeline | None:
    """The lifeline of this process, watched from the first call on; None where it was not started
    by another of ours.
    """
    said = os.environ.pop(VARIABLE, "")  # it is of no use to this process's own children
    if said:
        pipe, lock, path = said.split(":", 2)
        if not is_private(Path(path)):
            raise SystemExit(f"error: {path} is not a private folder of this user.")
        for descriptor in (int(pipe), int(lock)):
            os.set_inheritable(descriptor, False)
        quiet = os.environ.get("RANK", "0") != "0"
        line = Lifeline(PrivateFolder(Path(path), int(lock)), int(pipe), quiet=quiet)
        line.watch()
        _attached.append(line)
    return _attached[0] if _attached else None


def end_now(code: int) -> None:
    """End the process without waiting for its threads; print what was to be printed unless that
    takes long.
    """
    flush = Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1.0)
    for line in _attached:
        line.leave()
    os._exit(code)
