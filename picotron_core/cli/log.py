"""log.txt in a run's folder: what the run printed, in plain text, whoever saw it."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import FileIO
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from picotron_core.cli.output import lost_streams
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.files import open_append

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WIDTH = 120
MESSAGE = "%(levelname)s: %(message)s"
MOST = 1 << 20  # bytes that wait for a folder, or for room on its disk
log = logging.getLogger("picotron")


class Waiting(io.RawIOBase):
    """A file that takes what is written before it is opened, and while its disk is full, later."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._waiting = bytearray()
        self._writes = False

    def open(self, file: FileIO) -> None:
        self._file = file
        self.write(b"")

    def write(self, data: ReadableBuffer, /) -> int:
        whole = memoryview(data).cast("B")
        self._waiting += whole
        if self._file is None or self._writes:  # the latter: by the handler of a signal
            return len(whole)
        self._writes = True
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting[:])]
        except OSError:  # perhaps there is room later
            del self._waiting[MOST:]
        finally:
            self._writes = False
        return len(whole)

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if self._file:
            self._file.close()
        self._file = None
        super().close()


class RunLog:
    """The log of one run. Ranks other than the first write none.

    console: what is printed to it is in the log. handler: of `logging`, the same.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        raw: Any = Waiting()
        self._raw: Waiting = raw
        self._text = io.TextIOWrapper(
            raw, encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        self.quiet = quiet
        self.console = Console(
            file=self._text,
            quiet=quiet,
            width=WIDTH,
            soft_wrap=True,
            highlight=False,
            force_terminal=False,
            color_system=None,
        )
        self.handler: logging.Handler = logging.NullHandler()
        if not quiet:
            self.handler = logging.StreamHandler(self._text)
            self.handler.setFormatter(logging.Formatter(MESSAGE))
        self._told: set[str] = set()

    def open(self, run: RunDirectory) -> None:
        """Append to this run's log what was printed until now, and from now on."""
        if self.quiet:
            return
        try:
            self._raw.open(open_append(run.log))
        except OSError as error:
            log.warning("Cannot write %s: %s", run.log, error.strerror)

    def say(self, text: str) -> None:
        """Print a line on standard output, and in the log."""
        if not self.quiet:
            print(text, flush=True)
            self.note(text)

    def note(self, text: str) -> None:
        """Write a line into the log alone."""
        if not self.quiet:
            self._text.write(f"{text}\n")

    def note_lost_streams(self) -> None:
        """Say once that what is printed gets nowhere: in the log, and on standard error."""
        for name, why in lost_streams().items():
            if not self.quiet and name not in self._told:
                self._told.add(name)
                text = (
                    f"warning: {name} is lost ({why}). The run goes on; see log.txt in its folder."
                )
                self.note(text)
                print(text, file=sys.stderr, flush=True)

    @contextmanager
    def copying_stdout(self) -> Iterator[None]:
        """Have what is printed on standard output in the log, too, while this lasts."""
        if self.quiet:
            yield
            return
        with redirect_stdout(_Both(sys.stdout, self._text)):
            yield

    def close(self) -> None:
        self._text.close()


class _Both(io.TextIOBase):
    """Two text streams as one."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self._streams = (first, second)

    def write(self, text: str, /) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()


@contextmanager
def open_log(*, quiet: bool) -> Iterator[RunLog]:
    """The log of a run that is about to start; `RunLog.open` says which."""
    run_log = RunLog(quiet=quiet)
    run_log.note(time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    try:
        yield run_log
    finally:
        run_log.close()
