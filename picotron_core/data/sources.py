"""How one file, or one hub dataset, becomes documents. The format is decided by the suffix."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from picotron_core.errors import DataError, did_you_mean, reason

BLOCK = 1 << 20  # bytes read at a time where a whole file is not needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something that yields documents, the same ones each time that it is read."""

    documents: Callable[[], Iterator[str]]
    digest: str  # of the content and of what decides how it is read
    size_bytes: int


def file_source(path: Path, *, text_field: str, explicit: bool) -> Source | None:
    """Look at every byte of a file once: may it be read as text, and what is its digest?

    Args:
        text_field: the field or column of a .jsonl, .jsonl.gz or .parquet file.
        explicit: the user named this very file, so text that is not UTF-8 is an error. A file
            found in a folder is None instead, for the caller to count.

    Raises: DataError if the file cannot be read.
    """
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        kind, read = f"jsonl {text_field}", partial(read_jsonl, path, text_field)
    elif name.endswith(".parquet"):
        kind, read = f"parquet {text_field}", partial(read_parquet, path, text_field)
    else:
        kind, read = "text", partial(read_text, path)
    digest = hashlib.sha256(kind.encode())
    decoder = codecs.getincrementaldecoder("utf-8")() if kind == "text" else None
    size = 0
    try:
        before = _stamp(path)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                if decoder is not None:
                    if not explicit and b"\0" in block:  # valid UTF-8, but nobody's prose
                        return None
                    decoder.decode(block)
                digest.update(block)
                size += len(block)
        if decoder is not None:
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        if not explicit:
            return None
        # The decoder may carry up to three bytes from the block before.
        start = size - (len(error.object) - len(block)) + error.start
        raise DataError(
            f"{path} is not UTF-8 text: byte {start} is 0x{error.object[error.start]:02x}. "
            "Convert it, e.g. with iconv -t UTF-8, or leave it out of --data.paths."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    return Source(
        documents=partial(_unchanged, path, before, read),
        digest=digest.hexdigest(),
        size_bytes=size,
    )


def read_text(path: Path) -> Iterator[str]:
    """A text file is one document, line ends as they are; a byte-order mark is not text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield file.read()


def read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    """One JSON object a line, gzipped or not; the document is its `text_field`."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}. Mend or remove the line.") from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{where} holds a JSON {type(record).__name__}, not an object. "
                    f'Write one {{"{text_field}": "..."}} a line.'
                )
            if text_field not in record:
                raise DataError(_no_field(where, text_field, list(record)))
            yield _checked(record[text_field], where, text_field)


def read_parquet(path: Path, text_field: str) -> Iterator[str]:
    """The rows of one column, a row group's worth of batches at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"Reading {path} needs pyarrow, which is not installed: pip install 'picotron[data]'."
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise DataError(_no_field(str(path), text_field, columns))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    yield _checked(value, f"{path}, row {number}", text_field)
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not whole Parquet: {reason(error)}. Fetch it anew.") from None


def hub_source(name: str, *, text_field: str, split: str) -> Source:
    """A dataset of the Hugging Face hub; needs the `data` extra and, the first time, a network."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, trust_remote_code=False)
    except Exception as error:  # the library and the hub raise dozens of kinds
        raise DataError(
            f"No path {name} here, and the dataset {name!r} (split {split!r}) cannot be loaded: "
            f"{reason(error)}. Check --data.paths and --data.split."
        ) from error
    if text_field not in rows.column_names:
        raise DataError(_no_field(f"dataset {name!r}", text_field, rows.column_names))
    documents = partial(_rows, rows, name, text_field)
    digest = hashlib.sha256()
    size = 0
    for text in documents():
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
        size += len(encoded)
    return Source(documents=documents, digest=digest.hexdigest(), size_bytes=size)


def _rows(rows: Any, name: str, text_field: str) -> Iterator[str]:
    for number, row in enumerate(rows.select_columns([text_field])):
        yield _checked(row[text_field], f"dataset {name!r}, row {number}", text_field)


def _checked(value: object, where: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {text_field!r} is {type(value).__name__}, not text. "
            "Remove the record, or name another field with --data.text_field."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} of {text_field!r} is half of a surrogate pair, "
            "which no text can hold. Mend or remove the record."
        ) from None
    return value


def _no_field(where: str, text_field: str, found: list[str]) -> str:
    return (
        f"{where} has no field {text_field!r}; found: {', '.join(found) or 'nothing'}. "
        f"{did_you_mean(text_field, found)} Name it with --data.text_field."
    )


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(f"Cannot read {path}: {reason}. Check the file and who may read it.")


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _unchanged(
    path: Path, before: tuple[int, int], read: Callable[[], Iterator[str]]
) -> Iterator[str]:
    """The documents of the very bytes that the digest was made of."""
    try:
        if _stamp(path) != before:
            raise DataError(f"{path} changed while it was in use. Start again when it is still.")
        yield from read()
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        raise _unreadable(path, error) from None
