"""The numbers of a metrics file as arrays: a million lines in a few seconds.

Parsing each line as JSON takes ten times as long. Nearly all lines of a file have the same keys and
plain decimal numbers; those are read with array operations, thousands of lines at once, and every
other line as JSON.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from picotron_core.engine.metrics_file import (
    Block,
    parse_line,
    read_blocks,
    refuse_going_back,
    truncate_metrics,
)
from picotron_core.engine.run_directory import RunDirectory

WIDTH = 20  # characters of a number that arrays can read: 19 digits fit into 64 bits
LARGEST = float(np.finfo(np.float32).max)  # of a loss: the span of larger ones could not be drawn
TENS = np.longdouble(10) ** np.arange(WIDTH)  # where wider than 64 bits, results are exact
log = logging.getLogger("picotron")

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Curve:
    """A run's losses in nats per token, each with the step after which it was measured."""

    steps: Integers
    losses: Floats
    val_steps: Integers
    val_losses: Floats


@dataclass(frozen=True, slots=True)
class Rows:
    """Some successive lines of a file.

    end: the offset of the byte after the line.
    step: -1 for a line that is empty, or a last one that was cut short.
    values: by key; NaN for null, and in a line that does not have the key.
    """

    end: Integers
    step: Integers
    skipped: Booleans
    values: dict[str, Floats]


def read_curve(run: RunDirectory) -> Curve:
    """The losses of all updates that were made, and of all evaluations.

    Raises: DamagedFileError that names the line that is not one of a run's.
    """
    steps, losses = [np.empty(0, np.int64)], [np.empty(0)]
    val_steps, val_losses = [np.empty(0, np.int64)], [np.empty(0)]
    for rows in scan(run.metrics, ("loss", "val_loss")):
        loss, val_loss = rows.values["loss"], rows.values["val_loss"]
        made = (np.abs(loss) <= LARGEST) & ~rows.skipped
        steps.append(rows.step[made])
        losses.append(loss[made])
        evaluated = np.abs(val_loss) <= LARGEST
        val_steps.append(rows.step[evaluated])
        val_losses.append(val_loss[evaluated])
    return Curve(
        steps=np.concatenate(steps),
        losses=np.concatenate(losses),
        val_steps=np.concatenate(val_steps),
        val_losses=np.concatenate(val_losses),
    )


def rewind_metrics(run: RunDirectory, step: int, *, skips: int = 0) -> None:
    """Drop what was measured after `step`: resumed from there, those steps are done again.

    The file is cut, or left alone where it has nothing to drop; what stays is not written again.

    Args:
        skips: updates that float16 had skipped since that step when it was saved; those skipped
            later will be so once more.

    Raises: DamagedFileError that names the line that is not one of a run's; RunError where the file
        cannot be written.
    """
    kept = last = 0
    dropping = False
    for rows in scan(run.metrics):  # to its end: damage is found before anything is cut
        skipped = (rows.step == step) & rows.skipped
        drop = (rows.step > step) | (rows.step < 0)
        drop |= (rows.step == step) & (np.cumsum(skipped) > skips)
        skips -= int(skipped.sum())
        count = int(drop.argmax()) if drop.any() else len(drop)
        if count and not dropping:
            kept, last = int(rows.end[count - 1]), int(rows.step[count - 1])
        dropping = dropping or count < len(drop)
    if last < step:
        log.warning(
            "%s ends with step %d: what was measured until step %d is lost.",
            *(run.metrics, last, step),
        )
    truncate_metrics(run, kept)


def scan(path: Path, keys: Sequence[str] = ()) -> Iterator[Rows]:
    """Read a metrics file from its start to its end, in bounded memory.

    Args:
        keys: whose values are wanted, beside the steps.

    Raises: DamagedFileError that names the line that is not one of a run's.
    """
    before, number = 0, 1
    for block in read_blocks(path):
        rows = _rows(path, block, number, keys)
        known = np.flatnonzero(rows.step >= 0)
        steps = np.concatenate([[before], rows.step[known]])
        for index in np.flatnonzero(np.diff(steps) < 0):
            wrong = number + int(known[index])
            refuse_going_back(path, wrong, int(steps[index]), int(steps[index + 1]))
        before, number = int(steps[-1]), number + len(rows.step)
        yield rows


def _rows(path: Path, block: Block, number: int, keys: Sequence[str]) -> Rows:
    text = np.frombuffer(block.data + bytes(WIDTH), np.uint8)  # windows reach beyond the end
    ends = np.flatnonzero(text == ord("\n")) + 1
    if not len(ends) or ends[-1] < len(block.data):
        ends = np.append(ends, len(block.data))
    starts = np.concatenate([[0], ends[:-1]])
    count = len(ends)
    rows = Rows(
        end=ends + block.offset,
        step=np.full(count, -1),
        skipped=np.zeros(count, np.bool_),
        values={key: np.full(count, math.nan) for key in keys},
    )
    _read_plain(text, starts, ends, rows)
    for index in np.flatnonzero(rows.step < 0):
        line = block.data[starts[index] : ends[index]]
        is_last = block.is_last and index == count - 1
        record = parse_line(path, number + int(index), line, is_last=is_last)
        if record is not None:
            rows.step[index] = record["step"]
            rows.skipped[index] = record.get("skipped", False)
            for key, values in rows.values.items():
                values[index] = math.nan if record.get(key) is None else record[key]
    return rows


def _read_plain(text: Bytes, starts: Integers, ends: Integers, rows: Rows) -> None:
    """Fill in the lines that have the keys of the first one with a loss, and plain numbers. The
    others keep the step -1.
    """
    keys = _keys(text, starts, ends)
    if not keys:
        return
    plain = np.ones(len(ends), np.bool_)
    if text.view(np.int8)[:-WIDTH].min() < ord("\n"):  # control characters, or beyond ASCII
        foreign = np.flatnonzero(text.view(np.int8)[:-WIDTH] < ord("\n"))
        plain[np.searchsorted(ends, foreign, side="right")] = False
    marks = np.flatnonzero((text == ord(":")) | (text == ord(",")))  # they alternate in a line
    first_mark = np.searchsorted(marks, np.append(starts, len(text)))
    plain &= (text[starts] == ord("{")) & (text[ends - 2] == ord("}"))
    plain &= (text[ends - 1] == ord("\n")) & (np.diff(first_mark) == 2 * len(keys) - 1)
    lines = np.flatnonzero(plain)
    first, last = first_mark[lines], ends[lines] - 2
    windows = np.lib.stride_tricks.sliding_window_view(text, WIDTH)

    def value(key: str) -> tuple[Integers, Integers, Booleans]:
        """Where the values of a key begin, their lengths, and whether the key is this one."""
        place = 2 * keys.index(key)
        colon = marks[first + place]
        begin = colon + 1 + (text[colon + 1] == ord(" "))
        end = marks[first + place + 1] if place + 2 < 2 * len(keys) else last
        is_key = (text[colon] == ord(":")) & (text[colon - 1] == ord('"'))
        for back, letter in enumerate(reversed(key[-2:]), 2):
            is_key &= text[colon - back] == ord(letter)
        return begin, end - begin, is_key

    begin, length, is_plain = value("step")
    step, is_number = _decimals(windows[begin], length)
    is_plain &= is_number & (step < 1 << 53) & (step % 1 == 0)
    found = {}
    for key in rows.values.keys() & keys:
        begin, length, is_key = value(key)
        found[key], is_number = _decimals(windows[begin], length)
        is_null = (text[begin] == ord("n")) & (length == len("null"))
        found[key][is_null] = math.nan
        is_plain &= is_key & (is_number | is_null)
    if "skipped" in keys:
        begin, length, is_key = value("skipped")
        is_plain &= is_key & (length == len("false")) & (text[begin] == ord("f"))
    rows.step[lines[is_plain]] = step[is_plain].astype(np.int64)
    for key, numbers in found.items():
        rows.values[key][lines[is_plain]] = numbers[is_plain]


def _keys(text: Bytes, starts: Integers, ends: Integers) -> list[str]:
    """The keys of the first line with a loss; none where there is no such line among the first."""
    for start, end in zip(starts[:10], ends[:10], strict=True):
        try:
            record = json.loads(text[start:end].tobytes())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and {"step", "loss"} <= record.keys():
            return [] if "val_loss" in record else list(record)
    return []


def _decimals(window: Bytes, length: Integers) -> tuple[Floats, Booleans]:
    """Numbers like 12 and 3.25, and which of the windows hold one.

    Args:
        window: (lines, WIDTH), of which the first `length` bytes count.
    """
    longest = min(WIDTH, int(length.max(initial=1)))
    digits = np.ascontiguousarray(window[:, :longest].T) - np.uint8(ord("0"))
    inside = np.arange(longest)[:, None] < length
    is_digit = (digits < 10) & inside
    is_dot = (digits == (ord(".") - ord("0")) % 256) & inside
    num_digits, num_dots = is_digit.sum(axis=0), is_dot.sum(axis=0)
    plain = is_digit[0] & (num_dots <= 1) & (num_digits < WIDTH)
    plain &= num_digits + num_dots == length
    mantissa = np.zeros(len(length), np.uint64)
    for column, used in zip(digits, is_digit, strict=True):
        mantissa = np.where(used, mantissa * np.uint64(10) + column, mantissa)
    decimals = np.where(num_dots == 1, length - 1 - is_dot.argmax(axis=0), 0)
    return (mantissa / TENS[np.clip(decimals, 0, WIDTH - 1)]).astype(np.float64), plain
