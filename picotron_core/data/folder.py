"""Which files of a folder are documents, and of which split."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from picotron_core.data.format import COMPRESSED, RECORDS, suffix_of
from picotron_core.data.streams import printable
from picotron_core.errors import DataError

Part = Literal["train", "validation", "test"]

# The words by which the datasets library, too, tells the splits of a folder. There "eval" is a test
# split, but trainers mean by it what they evaluate on while they train.
_WORDS: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)})(?![a-z])", re.IGNORECASE)
_SHARD = re.compile(r"[-_.]?\d+([-_.]?of[-_.]?\d+)?")
# A program or page that is called train.py or test.md is no split.
_NO_SPLIT = {
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".java"),
    *(".kt", ".scala", ".go", ".rs", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".css", ".rb"),
    *(".php", ".pl", ".lua", ".swift", ".r", ".jl", ".hs", ".ml", ".ex", ".sh", ".bash"),
    *(".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".ipynb", ".md", ".rst", ".html"),
}
_BESIDE_DATA = re.compile(
    r"(readme|license|licence|copying|notice|authors|citation|changelog|contributing)\b",
    re.IGNORECASE,
)
# What tools keep in hidden folders is not worth a word.
_OF_TOOLS = frozenset((".git", ".hg", ".svn", ".cache", ".venv", ".tox", ".idea", ".vscode"))
_NEVER = frozenset(("__pycache__",))


@dataclass(slots=True)
class Left:
    """What is left out: names by reason."""

    names: dict[str, list[str]] = field(default_factory=dict)
    first_message: str = ""

    def add(self, reason: str, name: str, message: str = "") -> None:
        self.names.setdefault(reason, []).append(name)
        self.first_message = self.first_message or message

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a folder. name: its path from there, as it can be printed."""

    path: Path
    name: str
    part: Part


@dataclass(slots=True)
class Seen:
    """The files and folders that were met, by device and inode."""

    files: set[tuple[int, int]] = field(default_factory=set)
    folders: set[tuple[int, int]] = field(default_factory=set)


def files_of(folder: Path, left: Left, seen: Seen) -> Iterator[Found]:
    """The files below a folder, through links too, in an order that is the same everywhere.

    What is met a second time, by a link, is left out; so a loop of links ends.

    Raises: DataError if a folder cannot be read.
    """
    waiting: list[tuple[Path, str, Part]] = [(folder, "", "train")]
    while waiting:  # not by recursion: folders may be nested more deeply than Python's calls
        inner: list[tuple[Path, str, Part]] = []
        yield from _files_in(*waiting.pop(), left, seen, inner)
        waiting += reversed(inner)


def beside_data(found: Sequence[Found], are_records: Sequence[bool]) -> list[bool]:
    """Of each file, whether it only describes the data in its folder or below, as a README does.

    Args:
        are_records: of each file, whether it holds records.
    """
    data = {
        parent
        for file, records in zip(found, are_records, strict=True)
        if records or suffix_of(file.path.name) in RECORDS or file.part != "train"
        for parent in file.path.parents
    }
    return [file.path.parent in data and bool(_BESIDE_DATA.match(file.path.name)) for file in found]


def _files_in(
    folder: Path,
    prefix: str,
    part: Part,
    left: Left,
    seen: Seen,
    inner: list[tuple[Path, str, Part]],
) -> Iterator[Found]:
    """The files of one folder; the folders in it are added to `inner`."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        status = folder.stat()
    except OSError as error:
        raise DataError(
            f"Cannot read the folder {printable(folder)}: {error.strerror}. Check who may read it."
        ) from None
    if (status.st_dev, status.st_ino) in seen.folders:
        left.add("linked twice", f"{prefix or '.'}")
        return
    seen.folders.add((status.st_dev, status.st_ino))
    parts = split_of([name for name in names if not name.startswith(".")])
    for name in names:
        path, shown = folder / name, prefix + printable(name)
        of_it = parts.get(name, part) if part == "train" else part
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if not name.startswith("."):
                what = "dangling link" if path.is_symlink() else error.strerror or "unreadable"
                left.add(what, shown)
            continue
        if name.startswith("."):
            _count_hidden(path, shown, mode, left)
        elif stat.S_ISDIR(mode):
            if name not in _NEVER:
                inner.append((path, f"{shown}/", of_it))
        elif not stat.S_ISREG(mode):
            left.add("not a plain file", shown)
        elif _is_new(path, seen):
            yield Found(path, shown, of_it)
        else:
            left.add("linked twice", shown)


def _is_new(path: Path, seen: Seen) -> bool:
    status = path.stat()
    identity = status.st_dev, status.st_ino
    new = identity not in seen.files
    seen.files.add(identity)
    return new


def _count_hidden(path: Path, shown: str, mode: int, left: Left) -> None:
    """Hidden files are never read; those that look like data are counted."""
    if stat.S_ISREG(mode) and _looks_like_data(path.name):
        left.add("hidden", shown)
    elif stat.S_ISDIR(mode) and path.name not in _OF_TOOLS:
        try:
            with os.scandir(path) as entries:
                if any(_looks_like_data(entry.name) for entry in entries):
                    left.add("hidden", f"{shown}/")
        except OSError:  # it is not read anyway
            left.add("hidden", f"{shown}/")


def _looks_like_data(name: str) -> bool:
    return suffix_of(name) in (*RECORDS, ".txt") or name.lower().endswith(COMPRESSED)


def split_of(names: Sequence[str]) -> dict[str, Part]:
    """The split of each of these neighbours whose name tells one, as in train.jsonl beside
    test.jsonl. It counts only beside one of the training split, named alike; of files of records
    it is enough that the names begin alike, as those of train.jsonl and dev_matched.jsonl do.
    """
    told: dict[str, tuple[Part, tuple[str, str], bool]] = {}
    for name in names:
        match, suffix = _SPLIT.search(name), suffix_of(name)
        if match and suffix not in _NO_SPLIT:
            around = name[: match.start()], name[match.end() :].split(".")[0]
            before, after = (_SHARD.sub("", text) for text in around)
            told[name] = _WORDS[match[1].lower()], (before, after), suffix in RECORDS
    train = [(key, records) for part, key, records in told.values() if part == "train"]
    alike = {key for key, _ in train}
    begins = {before for (before, _), records in train if records}
    return {
        name: part
        for name, (part, key, records) in told.items()
        if key in alike or (records and key[0] in begins)
    }
