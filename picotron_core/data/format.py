"""What a file holds, told by its first bytes; its name decides only what those leave open."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from picotron_core.data.parsing import (
    IncompleteError,
    NotJSONError,
    loads,
    parse,
    skip_space,
    values_of,
)
from picotron_core.data.streams import UnsuitableFileError, printable

# text: one document. lines: a JSON object a line. json: an array, or objects one after the other.
Kind = Literal["text", "lines", "json", "parquet"]

COMPRESSED = (".gz", ".zst", ".zstd", ".xz", ".bz2", ".lz4")
LINES = (".jsonl", ".ndjson", ".jsonlines")
RECORDS = (*LINES, ".json", ".parquet")
# A name that ends so is of a file, not of a dataset on the hub.
FILES = (
    *RECORDS,
    *COMPRESSED,
    ".txt",
    ".text",
    ".md",
    ".csv",
    ".tsv",
    ".html",
    ".xml",
    ".py",
    ".log",
)

_UNPACK = "Unpack it, and name what is in it"
_CONVERT = "Convert it to text, JSON Lines or Parquet first"
_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive (or an office document or .npz file, which is one)", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"%PDF-", "a PDF document", "Extract its text first, e.g. with pdftotext"),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"ARROW1\x00\x00", "an Arrow file", _CONVERT),
    (b"\xff\xff\xff\xff", "an Arrow stream", _CONVERT),
    (b"PARE", "an encrypted Parquet file", "Decrypt it first"),
    (b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (b"GGUF", "a GGUF model", "Name text instead"),
    (b"\x89PNG", "a PNG image", "Name text instead"),
    (b"\xff\xd8\xff", "a JPEG image", "Name text instead"),
    (b"\x7fELF", "a program", "Name text instead"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "Run git lfs pull first"),
    *((b"\x80" + bytes([n]), "a Python pickle", _CONVERT) for n in (2, 3, 4, 5)),
)
_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MORE = re.compile(r"\Z|,?\s*\{|,\s*\Z")  # nothing, or another object
_OBJECT = re.compile(r'\{\s*["}]')  # how a JSON object begins


@dataclass(frozen=True, slots=True)
class Format:
    """How the decompressed bytes of a file are read."""

    kind: Kind
    encoding: str = "utf-8-sig"


def recognise(head: bytes, *, whole: bool, path: Path, layers: tuple[str, ...]) -> Format:
    """Tell the format of a file.

    Args:
        head: its first bytes, decompressed.
        whole: they are all of it.
        layers: how it was compressed.

    Raises: UnsuitableFileError if it is of a format that cannot be read as text.
    """
    name = printable(path)
    if head.startswith(b"PAR1"):
        return Format("parquet")
    for magic, what, advice in _MAGIC:
        # Prose may begin with the letters of a magic number, but has no NUL soon after them.
        if head.startswith(magic) and (b"\0" in head[:64] or not magic.isalpha()):
            kind = what.split(" (")[0].removeprefix("a ").removeprefix("an ")
            raise UnsuitableFileError(kind, f"{name} is {what}, not text. {advice}.")
    if head[257:262] == b"ustar":
        raise UnsuitableFileError("tar archive", f"{name} is a tar archive. {_UNPACK}.")
    suffix = suffix_of(path.name)
    if suffix == ".parquet" and head:
        raise UnsuitableFileError(
            "damaged", f"{name} is not whole Parquet: its first bytes are not PAR1. Fetch it anew."
        )
    encoding = next((e for mark, e in _MARKS if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and head.count(0) > len(head) // 5:
        raise UnsuitableFileError(
            "binary",
            f"{name} is binary, or UTF-16 without a byte-order mark. If it is text, convert it, "
            "e.g. with iconv -f UTF-16LE -t UTF-8.",
        )
    return Format(_kind_of_text(head_text(head, encoding), whole=whole, suffix=suffix), encoding)


def suffix_of(name: str) -> str:
    """The last suffix but those of compression, in lower case."""
    name = name.lower()
    while name.endswith(COMPRESSED):
        name = name[: name.rindex(".")]
    return Path(name).suffix


def _kind_of_text(text: str, *, whole: bool, suffix: str) -> Kind:
    start = skip_space(text, 0)
    if start == len(text):
        return "text"
    if text[start] == "[" and _is_array(text, start, whole=whole, suffix=suffix):
        return "json"
    if _are_mostly_objects(text, whole=whole):
        return "lines"
    if found := _kind_of_objects(text, start, whole=whole, suffix=suffix):
        return found
    if suffix in LINES:
        return "lines"
    return "json" if suffix == ".json" else "text"


def _are_mostly_objects(text: str, *, whole: bool) -> bool:
    """Whether more than half of the lines are JSON objects."""
    lines = text.split("\n")
    if not whole and len(lines) > 1:
        lines.pop()  # it is cut
    lines = [line for line in map(str.strip, lines) if line]
    likely = [line for line in lines if _OBJECT.match(line) and line.endswith("}")]
    if 2 * len(likely) <= len(lines):
        return False
    return 2 * sum(map(_loads_as_object, likely)) > len(lines)


def _loads_as_object(line: str) -> bool:
    try:
        return isinstance(loads(line), dict)
    except NotJSONError:
        return False


def _kind_of_objects(text: str, start: int, *, whole: bool, suffix: str) -> Kind | None:
    """How to read a text that begins with a JSON object which nothing but further ones follow; None
    if it does not.
    """
    if not _OBJECT.match(text, start):
        return None
    try:
        _, end = parse(text, start, final=whole)
    except IncompleteError:
        end = len(text)
    except NotJSONError:
        return None
    follows = skip_space(text, end)
    if not _MORE.match(text, follows):
        return None
    # One that ends in another line than it begins, or is followed by another in its line.
    if "\n" in text[start:end] or (follows < len(text) and "\n" not in text[end:follows]):
        return "json"
    return "json" if follows < len(text) and suffix not in LINES else "lines"


def _is_array(text: str, start: int, *, whole: bool, suffix: str) -> bool:
    """Whether the text is JSON arrays of objects, arrays or strings; prose may begin with "["."""
    first = skip_space(text, start + 1)
    if text[first : first + 1] not in ("{", '"', "[", "]"):
        return suffix == ".json"
    holds_objects = bool(re.match(r'\{\s*"', text[first : first + 1000]))
    try:
        # Of a long one the end is not in sight; one of objects that is cut short is no prose.
        _, end = parse(text, start, final=whole and not holds_objects)
    except IncompleteError:
        return True
    except NotJSONError:
        return suffix == ".json"
    return holds_objects or skip_space(text, end) == len(text)


def head_text(head: bytes, encoding: str) -> str:
    """The first bytes of a file as text; what is wrong with them is found when all are read."""
    return codecs.getincrementaldecoder(encoding)(errors="replace").decode(head)


def records_in(text: str, kind: Kind) -> Iterator[object]:
    """The records in the first part of a file, as far as they are whole."""
    if kind == "lines":
        for line in text.split("\n"):
            if line.strip():
                with suppress(NotJSONError):
                    yield loads(line)
        return
    with suppress(NotJSONError):
        yield from values_of(iter([text]))
