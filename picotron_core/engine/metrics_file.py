"""metrics.jsonl: what a run measures, an object a line, appended while it trains.

The file is read in blocks and never as a whole, so a long run's file, or a damaged one, takes no
more memory than a short one. Nothing but pictures and tables needs it: a damaged file is an error
where it would be continued or drawn, and nowhere else.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import DamagedFileError, RunError
from picotron_core.files import open_append, open_regular, open_update, write_all

if TYPE_CHECKING:  # reading a run must not wait for torch
    from picotron_core.engine.metrics import Record

BLOCK = 1 << 20
LONGEST = 1 << 14  # bytes of a line; those that Picotron writes have about 300
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before the first line
log = logging.getLogger("picotron")


class Block(NamedTuple):
    """Whole lines of a file. Of the last block, the last line may lack its end."""

    offset: int  # of the first byte
    data: bytes
    is_last: bool


def as_line(record: Record) -> dict[str, Any]:
    """A record as an object of metrics.jsonl."""
    return asdict(record)


def append_metrics(run: RunDirectory, record: Record) -> None:
    """Append a whole line, or nothing: half a line would spoil those that come after it.

    Raises: OSError.
    """
    line = (json.dumps(as_line(record)) + "\n").encode()
    with open_append(run.metrics) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            write_all(file, line)
        except OSError:
            file.truncate(end)
            raise


class Metrics:
    """Appends to metrics.jsonl. Lines that a full disk refuses wait in memory for a later step: a
    run does not stop because its log cannot be written.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.waiting: deque[Record] = deque()
        self.begun = False  # a line was written

    def append(self, record: Record) -> None:
        refused_before = bool(self.waiting)
        if self.begun and not refused_before and not self.run.metrics.exists():
            log.warning("%s was deleted; it is begun anew.", self.run.metrics)
        self.waiting.append(record)
        try:
            while self.waiting:
                append_metrics(self.run, self.waiting[0])
                self.waiting.popleft()
                self.begun = True
        except OSError as error:
            if not refused_before:
                log.warning(
                    "Cannot write %s: %s. What is measured is kept in memory until it can be.",
                    *(self.run.metrics, error.strerror),
                )


def read_blocks(path: Path) -> Iterator[Block]:
    """A metrics file in blocks of whole lines. NUL bytes at the end, which a power cut leaves where
    a file had grown, do not count. A missing file has no blocks.

    Raises: DamagedFileError where it cannot be read, or a line is too long to be one of ours.
    """
    offset, rest = 0, b""
    with _opened(path) as file:
        left = _end_of_data(file) if file else 0
        while file and left:
            data = file.read(min(BLOCK, left))
            if not data:
                raise DamagedFileError(f"{path} became shorter while it was read. Try again.")
            left -= len(data)
            data = rest + data
            cut = data.rfind(b"\n") + 1 if left else len(data)
            if len(data) - cut > LONGEST:
                file.seek(0)
                raise damaged(path, _lines(file, offset + cut) + 1, _TOO_LONG)
            if cut:
                yield Block(offset, data[:cut], is_last=not left)
            offset, rest = offset + cut, data[cut:]


def read_metrics(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a crash cut short is left out.

    Raises: DamagedFileError that names the line that is not one of a run's.
    """
    step = number = 0
    for block in read_blocks(run.metrics):
        lines = block.data.removesuffix(b"\n").split(b"\n")
        for index, line in enumerate(lines):
            number += 1
            is_last = block.is_last and index == len(lines) - 1
            if record := parse_line(run.metrics, number, line, is_last=is_last):
                refuse_going_back(run.metrics, number, step, record["step"])
                step = record["step"]
                yield record


def parse_line(path: Path, number: int, line: bytes, *, is_last: bool) -> dict[str, Any] | None:
    """The record in a line; None for an empty line, and for a last one that was cut short.

    Raises: DamagedFileError.
    """
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    if not line.strip():
        return None
    if len(line) > LONGEST:
        raise damaged(path, number, _TOO_LONG)
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        if is_last:
            return None
        raise damaged(path, number, "is not JSON") from None
    if not isinstance(record, dict):
        raise damaged(path, number, "is not a JSON object")
    step = record.get("step")
    if type(step) is not int or not 0 <= step < 1 << 63:
        raise damaged(path, number, "has no step that is a whole number")
    for key, value in record.items():
        if key == "skipped" and not isinstance(value, bool):
            raise damaged(path, number, "has a value for skipped other than true or false")
        if key != "skipped" and not (value is None or _is_number(value)):
            raise damaged(path, number, f"has a {key} that is not a number")
    return record


def refuse_going_back(path: Path, number: int, before: int, step: int) -> None:
    """Raises: DamagedFileError where a line's step is below that of the line before."""
    if step < before:
        raise damaged(path, number, f"is of step {step}, but follows step {before}")


def damaged(path: Path, number: int, what: str) -> DamagedFileError:
    """The error for a line that no run wrote."""
    return DamagedFileError(
        f"{path}:{number} {what}. Delete the line, or move the file away: training goes on "
        "without it, and only pictures and tables of the run lack what it held."
    )


def truncate_metrics(run: RunDirectory, size: int) -> None:
    """Cut the file to its first `size` bytes, which are whole lines, and end the last of them where
    the file does not. A crash leaves either the old size or the new one.

    Raises: RunError.
    """
    if not run.metrics.exists():
        return
    try:
        with open_update(run.metrics) as file:
            if file.seek(0, os.SEEK_END) != size:
                file.truncate(size)
            file.seek(max(size - 1, 0))
            if size and file.read(1) != b"\n":
                write_all(file, b"\n")
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"Cannot write {run.metrics}: {error.strerror}. Free space, or make it writable, then "
            "go on with --resume."
        ) from None


def _is_number(value: Any) -> bool:
    """Whether it is a number of JSON that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


_TOO_LONG = f"is longer than {LONGEST} bytes"


@contextmanager
def _opened(path: Path) -> Iterator[FileIO | None]:
    try:
        file = open_regular(path)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise _unreadable(path, reason) from None
    with file:
        try:
            yield file
        except OSError as error:
            raise _unreadable(path, error.strerror) from None


def _unreadable(path: Path, reason: str | None) -> DamagedFileError:
    return DamagedFileError(
        f"Cannot read {path}: {reason}. Make it a file that you can read and write, or move it "
        "away: training goes on without it."
    )


def _lines(file: FileIO, size: int) -> int:
    """The number of line ends in the next `size` bytes."""
    count = 0
    while size and (data := file.read(min(BLOCK, size))):
        count, size = count + data.count(b"\n"), size - len(data)
    return count


def _end_of_data(file: FileIO) -> int:
    """The size without the NUL bytes at the end. The file is then at its start."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        data = file.read(end - begin).rstrip(b"\0")
        if data:
            end = begin + len(data)
            break
        end = begin
    file.seek(0)
    return end
