"""Documents out of records: JSON or Parquet, of which one field holds the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from picotron_core.data.format import Kind
from picotron_core.data.parsing import RECORD_CHARS, NotJSONError, lines_of, loads, values_of
from picotron_core.data.streams import Stored, UnsuitableFileError, blocks_of, decoded, printable
from picotron_core.errors import DataError, did_you_mean, reason

OnBad = Literal["error", "skip"]
LOOK_AHEAD = 1000  # records that are looked at to see whether all of them lack text
SKIP = 'leave such records out with data.on_bad = "skip" (--data.on_bad skip)'

_JSON_NAMES = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string"}
_JSON_NAMES |= {list: "array", dict: "object", bytes: "bytes"}


@dataclass(frozen=True, slots=True)
class Bad:
    """A record without text. reason: in a few words, to count by; message: where and what;
    advice: what to do if all records are like it.
    """

    reason: str
    message: str
    advice: str


class NoTextError(UnsuitableFileError):
    """None of the records of a file has text."""


Record = tuple[str, object]  # where it stands, and its value; a Bad where it could not be read


def documents_of(
    records: Iterable[Record], *, text_field: str, on_bad: OnBad, skipped: Counter[str]
) -> Iterator[str]:
    """The text of each record.

    Args:
        on_bad: "skip" counts a record without text in `skipped`, by reason; "error" refuses it.

    Raises: DataError whose advice depends on whether any record has text.
    """
    good = False
    first: Bad | None = None
    seen = 0
    for where, value in records:
        found = value if isinstance(value, Bad) else _text_of(value, where, text_field)
        if isinstance(found, str):
            if first is not None and on_bad == "error":
                raise _one_of_many(first)
            good = True
            yield found
            continue
        if on_bad == "skip":
            skipped[found.reason] += 1
        elif good:
            raise _one_of_many(found)
        first = first or found
        seen += 1
        if on_bad == "error" and seen >= LOOK_AHEAD:
            break
    if first is not None and not good:
        raise NoTextError(f"no {text_field!r}", f"{first.message}. {first.advice}")


def _one_of_many(bad: Bad) -> DataError:
    return DataError(f"{bad.message}. Other records have text: mend or remove this one, or {SKIP}.")


def _text_of(value: object, where: str, text_field: str) -> str | Bad:
    if isinstance(value, str):  # an element of an array of strings
        text = value
    elif not isinstance(value, dict):
        found = _JSON_NAMES.get(type(value), type(value).__name__)
        return Bad(
            "not an object",
            f"{where} holds a JSON {found}, not an object",
            f'Write one {{"{text_field}": "..."}} for each document.',
        )
    elif text_field not in value:
        return without_field(where, text_field, list(value))
    elif not isinstance(value[text_field], str):
        return _not_text(value[text_field], where, text_field)
    else:
        text = value[text_field]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Bad(
            "half of a surrogate pair",
            f"{where}: character {error.start} of {text_field!r} is half of a surrogate pair, "
            "which no text can hold",
            "Mend or remove the record.",
        )
    return text


def _not_text(value: object, where: str, text_field: str) -> Bad:
    found = _JSON_NAMES.get(type(value), type(value).__name__)
    article = "an" if found[0] in "ao" else "a"
    return Bad(
        f"{text_field!r} is null" if value is None else f"{text_field!r} is not a string",
        f"{where}: {text_field!r} is {found if value is None else f'{article} {found}'}, not text",
        "Name another field with --data.text_field.",
    )


def without_field(where: str, text_field: str, fields: list[str]) -> Bad:
    """A record, or a table, that has other fields."""
    named = ", ".join(map(printable, fields[:20])) + (", ..." if len(fields) > 20 else "")
    chat = _chat_fields(fields)
    if chat:
        advice = (
            f"These are chat or instruction records ({chat}), which `train` does not read. Render "
            "each to plain text first with the chat template of a tokenizer (transformers' "
            f"apply_chat_template with tokenize=False), into a field {text_field!r}."
        )
    elif fields:
        near = did_you_mean(text_field, fields)
        advice = f"{near if near.startswith('Did') else ''} Name the one that holds the text with "
        advice = advice.lstrip() + "--data.text_field."
    else:
        advice = f'Write one {{"{text_field}": "..."}} for each document.'
    return Bad(
        f"no {text_field!r}",
        f"{where} has no field {text_field!r}; found: {named or 'nothing'}",
        advice,
    )


def _chat_fields(fields: list[str]) -> str:
    """The fields, among these, of a known format of conversations or instructions."""
    names = {field.lower(): field for field in fields}
    for wanted in (
        *(("messages",), ("conversations",), ("conversation",), ("dialogue",)),
        *(("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen")),
        *(("instruction", "output"), ("instruction", "response"), ("chosen", "rejected")),
        *(("question", "answer"), ("system", "user")),
    ):
        if names.keys() >= set(wanted):
            return " and ".join(repr(names[name]) for name in wanted)
    return ""


def json_records(
    stored: Stored, layers: tuple[str, ...], kind: Kind, encoding: str
) -> Iterator[Record]:
    """The values of a file of JSON, with the place of each."""
    text = decoded(blocks_of(stored, layers), encoding)
    if kind == "lines":
        yield from _line_records(stored.name, text)
        return
    number = 0
    try:
        for value in values_of(text):
            number += 1
            yield f"{stored.name}, record {number}", value
    except NotJSONError as error:
        # Where the next value begins cannot be told from one that is wrong.
        raise UnsuitableFileError(
            "damaged JSON",
            f"{stored.name} is not JSON after {number} values: {error}. Mend the file, or write "
            "one record a line (JSON Lines).",
        ) from None


def _line_records(name: str, text: Iterator[str]) -> Iterator[Record]:
    for number, line in enumerate(lines_of(text), start=1):
        where = f"{name}:{number}"
        if line is None:
            yield (
                where,
                Bad(
                    "longer than a record may be",
                    f"{where} is longer than {RECORD_CHARS} characters, which is too long for one "
                    "record",
                    "Write long documents as text files of their own.",
                ),
            )
        elif line.strip():
            try:
                yield where, loads(line.removeprefix("\ufeff"))  # of files that were joined
            except NotJSONError as error:
                advice = "Mend or remove the line."
                yield where, Bad("not JSON", f"{where} is not JSON: {error}", advice)


def parquet_records(open_file: Any, name: str, text_field: str) -> Iterator[Record]:
    """The rows of one column of a Parquet file, a few megabytes at a time.

    Raises: DataError if pyarrow is missing, UnsuitableFileError if the file is not whole.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"Reading {name} needs pyarrow, which is not installed: pip install 'picotron[data]'."
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(open_file, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if (count := columns.count(text_field)) > 1:
                raise UnsuitableFileError(
                    f"{count} columns {text_field!r}",
                    f"{name} has {count} columns {text_field!r}: rename all but the one that holds "
                    "the text.",
                )
            if text_field not in columns:
                bad = without_field(name, text_field, columns)
                raise UnsuitableFileError(bad.reason, f"{bad.message}. {bad.advice}")
            number = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file), columns=[text_field]):
                for value in batch.column(text_field):
                    where = f"{name}, row {number}"
                    try:
                        yield where, {text_field: value.as_py()}
                    except UnicodeDecodeError:
                        yield where, Bad("not UTF-8", f"{where} is not UTF-8", "Mend the file.")
                    number += 1
    except pyarrow.ArrowException as error:
        raise _not_whole(name, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _not_whole(name, error) from None


def _batch_rows(file: Any) -> int:
    """Rows of some 4 MB together."""
    groups = [file.metadata.row_group(n) for n in range(min(file.metadata.num_row_groups, 8))]
    rows = sum(group.num_rows for group in groups)
    size = sum(group.total_byte_size for group in groups)
    return max(1, min(1024, int((1 << 22) * rows // max(size, 1))))


def _not_whole(name: str, error: Exception) -> UnsuitableFileError:
    return UnsuitableFileError(
        "damaged", f"{name} is not whole Parquet: {reason(error)}. Fetch it anew."
    )
