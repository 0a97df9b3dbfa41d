"""A file, or a dataset of the hub, as a source of documents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from picotron_core.data.format import (
    LINES,
    Format,
    Kind,
    head_text,
    recognise,
    records_in,
    suffix_of,
)
from picotron_core.data.pipes import unpacked
from picotron_core.data.records import (
    OnBad,
    Record,
    documents_of,
    json_records,
    parquet_records,
    without_field,
)
from picotron_core.data.streams import (
    BLOCK,
    Stamp,
    Stored,
    UnsuitableFileError,
    blocks_of,
    decoded,
    errors_of,
    read_head,
)
from picotron_core.errors import DataError

# A part of a document, and whether it is the last: a document may be too long to hold.
Fragment = tuple[str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something that yields documents, the same ones each time that it is read.

    fragments: called with a counter of the records that are skipped, by reason.
    digest: of the content and of what decides how it is read.
    """

    fragments: Callable[[Counter[str]], Iterator[Fragment]]
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What one look at every byte of a file found.

    layers: of compression. digest: of the decompressed bytes. refused: why it cannot be read, as
    (reason, message), or None.
    """

    layers: tuple[str, ...] = ()
    kind: Kind = "text"
    encoding: str = "utf-8-sig"
    digest: str = ""
    size_bytes: int = 0
    refused: tuple[str, str] | None = None


def scan_file(stored: Stored, *, text_field: str, explicit: bool, keep_in: Path | None) -> Scan:
    """Look at every byte of a file once: what is it, and can it be read to its end?

    Args:
        explicit: the user named this very file. One that was found in a folder is refused more
            easily: where it holds a NUL, or JSON that is not records.
        keep_in: the folder for copies, see `pipes`.

    Raises: DataError if the file cannot be read at all.
    """
    size_bytes = 0
    try:
        with errors_of(stored), unchanged(stored, stored.stamp()):
            size_bytes = stored.stamp()[0]
            layers, head = read_head(stored)
            whole = len(head) < BLOCK
            found = recognise(head, whole=whole, path=stored.path, layers=layers)
            if not explicit and found.kind != "parquet":
                _refuse_oddities(stored, head, found, text_field)
            digest = _digest(stored, layers, found, explicit=explicit)
            if found.kind == "parquet":
                # Look at its end, where its columns are described.
                next(parquet_rows(stored, layers, text_field, keep_in), None)
    except UnsuitableFileError as error:
        return Scan(refused=(error.reason, str(error)), size_bytes=size_bytes)
    return Scan(
        layers=layers,
        kind=found.kind,
        encoding=found.encoding,
        digest=digest,
        size_bytes=size_bytes,
    )


def _refuse_oddities(stored: Stored, head: bytes, found: Format, text_field: str) -> None:
    """JSON that nobody meant as documents: settings, notebooks, the description of a package."""
    if found.kind == "text" or suffix_of(stored.path.name) in LINES:
        return
    records = list(records_in(head_text(head, found.encoding), found.kind))
    fields = [list(record) for record in records if isinstance(record, dict)]
    are_texts = any(isinstance(record, str) for record in records)
    if records and not are_texts and not any(text_field in names for names in fields):
        bad = without_field(stored.name, text_field, fields[0] if fields else [])
        reason = f"JSON without {text_field!r}"
        raise UnsuitableFileError(reason, f"{bad.message}. {bad.advice}")


def _digest(stored: Stored, layers: tuple[str, ...], found: Format, *, explicit: bool) -> str:
    digest = hashlib.sha256()
    size = 0

    def blocks() -> Iterator[bytes]:
        nonlocal size
        for block in blocks_of(stored, layers):
            digest.update(block)
            size += len(block)
            if found == Format("text") and not explicit and b"\0" in block:
                # Valid UTF-8, but nobody's prose.
                raise UnsuitableFileError("binary", f"{stored.name} holds NUL bytes: it is binary.")
            yield block

    if found.kind == "parquet":
        for _ in blocks():
            pass
        return digest.hexdigest()
    try:
        for _ in decoded(blocks(), found.encoding):
            pass
    except UnicodeDecodeError as error:
        raise _not_text(stored, error, found.encoding, size) from None
    return digest.hexdigest()


def _not_text(
    stored: Stored, error: UnicodeDecodeError, encoding: str, size: int
) -> UnsuitableFileError:
    """The error for a byte that the text cannot hold; `size`: bytes read, its block included."""
    start = size - len(error.object) + error.start
    name = {"utf-8-sig": "UTF-8", "utf-16": "UTF-16", "utf-32": "UTF-32"}[encoding]
    found = f"0x{error.object[error.start]:02x}" if error.object else "missing"
    return UnsuitableFileError(
        f"not {name}",
        f"{stored.name} is not {name} text: byte {start} is {found}. Convert it, e.g. with iconv "
        "-t UTF-8, or leave it out of --data.paths.",
    )


@contextmanager
def unchanged(stored: Stored, before: Stamp) -> Iterator[None]:
    """See to it that the bytes that are read are those that `before` was taken of.

    Raises: DataError if the file changed.
    """

    def check() -> None:
        size, mtime, _, inode = stored.stamp()
        if (size, mtime, inode) != (before[0], before[1], before[3]):
            raise DataError(
                f"{stored.name} changed while it was in use. Start again when it is still."
            )

    check()
    yield
    check()


def file_source(
    stored: Stored, scan: Scan, *, text_field: str, on_bad: OnBad, keep_in: Path | None
) -> Source:
    """A file as a source of documents, from what a scan found."""
    kind = scan.kind if scan.kind == "text" else f"{scan.kind} {text_field} {on_bad}"
    digest = hashlib.sha256(f"{kind} {scan.encoding}\n{scan.digest}".encode()).hexdigest()
    read = partial(_fragments, stored, stored.stamp(), scan, text_field, on_bad, keep_in)
    return Source(fragments=read, digest=digest, size_bytes=scan.size_bytes)


def _fragments(
    stored: Stored,
    before: Stamp,
    scan: Scan,
    text_field: str,
    on_bad: OnBad,
    keep_in: Path | None,
    skipped: Counter[str],
) -> Iterator[Fragment]:
    with errors_of(stored), unchanged(stored, before):
        if scan.kind == "text":
            # Twice, for a document that is blank is none, and too long to hold.
            if any(text.strip() for text in _text(stored, scan)):
                for text in _text(stored, scan):
                    yield text, False
                yield "", True
            return
        if scan.kind == "parquet":
            records = parquet_rows(stored, scan.layers, text_field, keep_in)
        else:
            records = json_records(stored, scan.layers, scan.kind, scan.encoding)
        for text in documents_of(records, text_field=text_field, on_bad=on_bad, skipped=skipped):
            if text.strip():
                yield text, True


def _text(stored: Stored, scan: Scan) -> Iterator[str]:
    return decoded(blocks_of(stored, scan.layers), scan.encoding)


def parquet_rows(
    stored: Stored, layers: tuple[str, ...], text_field: str, keep_in: Path | None
) -> Iterator[Record]:
    """The rows of a Parquet file; one that is compressed once more is unpacked first."""
    if layers:
        stored = unpacked(stored, blocks_of(stored, layers), keep_in)
    with stored.open() as file:
        yield from parquet_records(file, stored.name, text_field)
