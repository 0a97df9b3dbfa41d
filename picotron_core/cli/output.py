"""Standard input, output and error that may be missing, or break while a run prints.

A terminal is closed, the reader of a pipe ends (`picotron train | head`), the disk behind `> log`
is full: none of them is worth a run.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from picotron_core.files import open_null

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

NAMES = {"stdout": "standard output", "stderr": "standard error"}
PIECE = getattr(select, "PIPE_BUF", 512)  # bytes that a pipe takes at once if `select` has it ready
LOOK_S = 0.5  # between two looks whether a reader that does not read is still worth waiting for


class Lasting(io.RawIOBase):
    """A descriptor to which writing never fails: what it does not take is dropped.

    lost: why it did not take the last that was written; "" where it did.
    hurried: do not wait longer than a moment for a reader that does not read.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.lost, self.hurried = descriptor, "", False

    def write(self, data: ReadableBuffer, /) -> int:
        whole = rest = memoryview(data).cast("B")
        try:
            while rest:
                self._wait()
                rest = rest[os.write(self.descriptor, rest[:PIECE]) :]
            self.lost = ""
        except OSError as error:
            self.lost = error.strerror or type(error).__name__
        return len(whole)

    def _wait(self) -> None:
        """Raises: TimeoutError where a stop was asked for, and nobody reads."""
        unread = "nobody reads it"
        while not select.select([], [self.descriptor], [], 0 if self.lost == unread else LOOK_S)[1]:
            if self.hurried:
                raise TimeoutError(0, unread)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)


def open_missing() -> None:
    """Open the null device for those of the descriptors 0 to 2 that are closed, as after `>&-`: the
    next file that is opened, a checkpoint perhaps, would get the number, and what is meant for
    standard output or error would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(open_null(), True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            raw: Any = (
                io.BufferedReader(io.FileIO(0, closefd=False)) if not number else Lasting(number)
            )
            setattr(sys, name, io.TextIOWrapper(raw, line_buffering=True))


@contextmanager
def lasting(*names: str) -> Iterator[None]:
    """Have printing to these streams, by their names in `sys`, never fail while this lasts."""
    former = {name: getattr(sys, name) for name in names}
    for name, stream in former.items():
        setattr(sys, name, _lasting(stream))
    try:
        yield
    finally:
        for name, stream in former.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def _lasting(stream: Any) -> Any:
    """The same stream on `Lasting`, unless it has no descriptor, as one that a test captures."""
    try:
        stream.flush()
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return stream
    raw: Any = Lasting(descriptor)  # unbuffered: a signal's handler may print in mid-print
    return io.TextIOWrapper(
        raw, encoding=stream.encoding, errors="backslashreplace", line_buffering=True
    )


def lost_streams() -> dict[str, str]:
    """The streams that do not take what is printed, by name, and why."""
    return {
        told: raw.lost
        for name, told in NAMES.items()
        if (raw := _raw(getattr(sys, name))) and raw.lost
    }


def hurry() -> None:
    """A stop was asked for: do not wait for a reader that does not read."""
    for name in NAMES:
        if raw := _raw(getattr(sys, name)):
            raw.hurried = True


def _raw(stream: TextIO) -> Lasting | None:
    raw = getattr(stream, "buffer", None)
    return raw if isinstance(raw, Lasting) else None


def flush_or_drop() -> OSError | None:
    """Print what standard output still holds. Where it cannot be, drop it, for the interpreter
    would try again as it ends; the error is returned.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        null = open_null()
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return error
    return None
