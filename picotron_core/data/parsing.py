"""JSON values one after the other out of a text that is too long to hold."""

from __future__ import annotations

import json
from collections.abc import Iterator

RECORD_CHARS = 1 << 25  # of one record; a longer one would need memory without bound
_NEAR_END = 16  # characters: a literal or escape that is cut here may be whole with more text
_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"


class NotJSONError(Exception):
    """What is wrong with a text that is not JSON."""


class IncompleteError(Exception):
    """The text ends inside a value."""


def parse(text: str, at: int = 0, *, final: bool = True) -> tuple[object, int]:
    """The JSON value that begins at a position, and where it ends.

    Args:
        final: the text is all there is; otherwise more may follow.

    Raises: IncompleteError if more text may make it whole, NotJSONError if it is not JSON.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise NotJSONError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - _NEAR_END
        if cut and not final:
            raise IncompleteError from None
        raise NotJSONError(f"{error.msg}, character {error.pos - at + 1}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise NotJSONError(str(error)) from None


def loads(line: str) -> object:
    """The one JSON value in a line.

    Raises: NotJSONError.
    """
    start = skip_space(line, 0)
    value, end = parse(line, start)
    if (rest := skip_space(line, end)) < len(line):
        raise NotJSONError(f"more text follows the value, character {rest + 1}")
    return value


def skip_space(text: str, at: int) -> int:
    """The position of the first character from here that is no white space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def lines_of(fragments: Iterator[str]) -> Iterator[str | None]:
    """The lines of a text, at "\\n" alone; None for one of more than RECORD_CHARS."""
    parts: list[str] = []
    length = 0
    for fragment in fragments:
        *ended, rest = fragment.split("\n")
        for line in ended:
            length += len(line)
            yield "".join((*parts, line)) if length <= RECORD_CHARS else None
            parts, length = [], 0
        length += len(rest)
        if length > RECORD_CHARS:
            parts = []  # the rest of it is only skipped
        elif rest:
            parts.append(rest)
    if length:
        yield "".join(parts) if length <= RECORD_CHARS else None


def values_of(fragments: Iterator[str]) -> Iterator[object]:
    """The elements of JSON arrays, or values that follow one another, with commas or without.

    Raises: NotJSONError where the text is neither, with a value longer than RECORD_CHARS too.
    """
    text, at, before = "", 0, 0  # the position; characters of the file that were dropped
    in_array: bool | None = None
    wanted = 0  # characters to hold before another try: each try begins anew
    final = False
    while True:
        while not final and len(text) - at < max(wanted, 1):
            more = next(fragments, None)
            final = more is None
            text, at, before = text[at:] + (more or ""), 0, before + at
        at = skip_space(text, at)
        if at == len(text):
            if final and in_array:
                raise NotJSONError("the array is cut short: it has no end")
            if final:
                return
            continue
        if in_array is None:
            in_array = text[at] == "["
            if in_array:
                at += 1
                continue
        elif text[at] == "," or (in_array and text[at] == "]"):
            if text[at] == "]":
                in_array = None  # another array may follow
            at += 1
            continue
        try:
            value, at = parse(text, at, final=final)
        except IncompleteError:
            wanted = 2 * (len(text) - at)
            if wanted > 2 * RECORD_CHARS:
                raise NotJSONError(
                    f"a value is longer than {RECORD_CHARS} characters, at character {before + at}"
                ) from None
            continue
        except NotJSONError as error:
            raise NotJSONError(f"{error}, of the value at character {before + at + 1}") from None
        wanted = 0
        yield value
