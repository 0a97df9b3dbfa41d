"""The text: files, folders, a hub dataset, or the standard library of the Python that runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from picotron_core.data import hub, pipes
from picotron_core.data.folder import (
    Found,
    Left,
    Part,
    Seen,
    beside_data,
    files_of,
    split_of,
)
from picotron_core.data.format import FILES
from picotron_core.data.records import NoTextError, OnBad
from picotron_core.data.scans import Scans, open_scans
from picotron_core.data.sources import Fragment, Scan, Source, file_source, scan_file
from picotron_core.data.streams import Stored, UnsuitableFileError, errors_of, printable
from picotron_core.errors import DataError

# Folders of the standard library that hold tests, other people's code, or programs beside it.
NOT_LIBRARY = {
    *("site-packages", "dist-packages", "lib-dynload", "ensurepip", "lib2to3", "__phello__"),
    *("test", "tests", "idle_test", "idlelib", "turtledemo"),
}

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_NAMES = 3  # of each kind that are shown of what was left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents in a stable order.

    label: one line for a log. size_bytes: as stored. sources: the text to train on, and to hold
    out a part of; validation: text that is given for validation, if any. hint: what was wrong with
    a file that was left out. skips: records without text are left out, whole files of them too.
    """

    label: str
    size_bytes: int
    sources: tuple[Source, ...]
    validation: tuple[Source, ...] = ()
    hint: str = ""
    skips: bool = False

    def fragments(
        self, part: Part = "train", *, skipped: Counter[str] | None = None
    ) -> Iterator[Fragment]:
        """The text of every document that is not blank, in order, and where each ends; may be read
        any number of times.

        Args:
            skipped: counts the records that are skipped, by reason.

        Raises: DataError if there is none.
        """
        counter = Counter[str]() if skipped is None else skipped
        empty = True
        without_text: NoTextError | None = None
        for source in self.sources if part == "train" else self.validation:
            try:
                for fragment in source.fragments(counter):
                    empty = False
                    yield fragment
            except NoTextError as error:
                if not self.skips:
                    raise
                without_text = without_text or error  # its records are counted as skipped
        if empty and without_text is not None:
            raise without_text
        if empty:
            kind = "training text" if self.validation and part == "train" else "text"
            kind = "text for validation" if part == "validation" else kind
            raise DataError(
                f"The corpus is empty: no {kind} in {self.label}. {self.hint}"
                f"{' ' if self.hint else ''}Name files that hold text with --data.paths."
            )

    def documents(self) -> Iterator[str]:
        """The documents to train on, each as one text."""
        texts: list[str] = []
        for text, last in self.fragments():
            texts.append(text)
            if last:
                yield "".join(texts)
                texts = []

    def fingerprint(self) -> str:
        """Hex digest of the content: equal where the documents are, wherever the files lie."""
        digests = [source.digest for source in self.sources]
        if self.validation:
            digests += ["validation", *(source.digest for source in self.validation)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


@dataclass(slots=True, kw_only=True)
class _Search:
    """How files are looked for, and what has been found so far."""

    text_field: str
    on_bad: OnBad
    cache_dir: Path | None
    ranks: int
    left: Left = field(default_factory=Left)
    seen: Seen = field(default_factory=Seen)
    train: list[Source] = field(default_factory=list)
    validation: list[Source] = field(default_factory=list)
    validation_names: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def add(self, source: Source, part: Part, name: str) -> None:
        if part == "validation":
            self.validation.append(source)
            self.validation_names.append(name)
        else:
            self.train.append(source)


def open_corpus(
    paths: Sequence[str],
    *,
    text_field: str = "text",
    split: str = "train",
    on_bad: OnBad = "error",
    cache_dir: Path | None = None,
    ranks: int = 1,
) -> Corpus:
    """Find the text that is meant, and look at every byte that was not looked at before.

    Args:
        paths: files of text, JSON or Parquet, compressed or not; folders (recursive); pipes, or "-"
            for standard input; or names of Hugging Face datasets; none means the source of the
            running Python's standard library.
        text_field: the field or column that holds the text.
        split: the split of a Hugging Face dataset.
        on_bad: whether a record without text is skipped, or an error.
        cache_dir: a folder for copies of pipes, and for what was found in files.
        ranks: how many processes read the same paths.

    Raises: DataError if a path is missing or unreadable, or is not text.
    """
    search = _Search(text_field=text_field, on_bad=on_bad, cache_dir=cache_dir, ranks=ranks)
    for path in paths:
        neighbours = [
            Path(other).name for other in paths if Path(other).parent == Path(path).parent
        ]
        part = split_of(neighbours).get(Path(path).name, "train")
        _find(path, part, split, search)
    if not paths:
        root = Path(sysconfig.get_path("stdlib"))
        library = [Found(file, str(file.relative_to(root)), "train") for file in _library(root)]
        _add_files(root, library, "train", search)
    size_bytes = sum(source.size_bytes for source in (*search.train, *search.validation))
    return Corpus(
        label=_label(paths, search, size_bytes),
        size_bytes=size_bytes,
        sources=tuple(search.train),
        validation=tuple(search.validation),
        hint=search.left.first_message,
        skips=on_bad == "skip",
    )


def _find(name: str, part: Part, split: str, search: _Search) -> None:
    """Add the documents of one path that the user named."""
    path = Path(name).expanduser()
    if "\0" in name or len(os.fsencode(path.name)) > 255:
        raise DataError(f"No file or folder {printable(name)!r}. Check --data.paths.")
    if part == "test":
        search.left.add("test split", printable(name))
    elif name and os.path.isdir(path):  # unlike Path.is_dir, never raises
        _add_files(path, list(files_of(path, search.left, search.seen)), part, search)
    elif name == pipes.STDIN or (name and os.path.exists(path)):
        _add_named(name, part, search)
    elif name.startswith(("/dev/fd/", "/proc/self/fd/")) and search.ranks > 1:
        raise DataError(pipes.only_once(name, search.ranks))
    elif os.path.islink(path):
        raise DataError(f"{printable(name)} is a link that leads nowhere. Check --data.paths.")
    elif not HUB_NAME.fullmatch(name) or name.lower().endswith(FILES):
        raise DataError(f"No file or folder {printable(name)!r}. Check --data.paths.")
    elif importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"No file or folder {name!r}. Check --data.paths; if it is a Hugging Face dataset, "
            "pip install 'picotron[data]' first."
        )
    else:
        source = hub.source_of(
            name, text_field=search.text_field, split=split, on_bad=search.on_bad
        )
        search.add(source, part, name)


def _add_named(name: str, part: Part, search: _Search) -> None:
    """Add a file or pipe that the user named: whatever is wrong with it is an error."""
    stored = pipes.stored_at(name, keep_in=search.cache_dir, ranks=search.ranks)
    shown = "standard input" if name == pipes.STDIN else printable(name)
    with errors_of(stored):
        status = stored.path.stat() if stored.descriptor is None else os.fstat(stored.descriptor)
    identity = status.st_dev, status.st_ino
    if identity in search.seen.files:
        search.twice.append(shown)
    search.seen.files.add(identity)
    scans = open_scans(
        None if stored.descriptor is not None else search.cache_dir,
        stored.path,
        search.text_field,
    )
    scan = _scan(stored, scans, search, explicit=True)
    scans.save()
    if scan.refused is not None:
        raise UnsuitableFileError(*scan.refused)
    search.add(_source(stored, scan, search), part, shown)


def _add_files(folder: Path, found: Sequence[Found], part: Part, search: _Search) -> None:
    """Add what was found in a folder, itself of `part`: what is no text is left out."""
    scans = open_scans(search.cache_dir, folder, search.text_field)
    scanned = [
        None if file.part == "test" else _scan(Stored(file.path), scans, search, explicit=False)
        for file in found
    ]
    scans.save()
    are_records = [scan is not None and scan.kind != "text" for scan in scanned]
    for file, scan, beside in zip(found, scanned, beside_data(found, are_records), strict=True):
        if beside:
            search.left.add("beside data", file.name)
        elif scan is None:
            search.left.add("test split", file.name)
        elif scan.refused is not None:
            reason, message = scan.refused
            search.left.add(reason, file.name, message)
        else:
            source = _source(Stored(file.path), scan, search)
            search.add(source, "validation" if part == "validation" else file.part, file.name)


def _scan(stored: Stored, scans: Scans, search: _Search, *, explicit: bool) -> Scan:
    """What a file is; as it was found before, if it has not changed."""
    with errors_of(stored):
        stamp, path = stored.stamp(), stored.path.resolve()
    scan = scans.get(path, stamp)
    if scan is None:
        began_ns = time.time_ns()
        scan = scan_file(
            stored, text_field=search.text_field, explicit=explicit, keep_in=search.cache_dir
        )
        scans.put(path, stamp, scan, began_ns=began_ns)
    return scan


def _source(stored: Stored, scan: Scan, search: _Search) -> Source:
    with errors_of(stored):
        return file_source(
            stored,
            scan,
            text_field=search.text_field,
            on_bad=search.on_bad,
            keep_in=search.cache_dir,
        )


def _library(root: Path) -> list[Path]:
    """The modules of the standard library."""
    return [
        file.path
        for file in files_of(root, Left(), Seen())
        if file.path.suffix == ".py"
        and not file.path.name.startswith("_sysconfigdata")  # made by the build: paths and flags
        and not NOT_LIBRARY.intersection(file.path.relative_to(root).parts)
    ]


def _label(paths: Sequence[str], search: _Search, size_bytes: int) -> str:
    """E.g. "data/, 3 files of 4, 1 skipped (1 not UTF-8: old.txt), 2.1 MB"."""
    read, left = len(search.train) + len(search.validation), len(search.left)
    files = f"{read} file{'' if read == 1 else 's'}{f' of {read + left}' if left else ''}"
    label = [_name(paths), files]
    if names := search.validation_names:
        label.append(f"{len(names)} for validation ({_some(names)})")
    if search.twice:
        label.append(f"{len(search.twice)} read twice ({_some(search.twice)})")
    if left:
        kinds = [f"{len(n)} {reason}: {_some(n)}" for reason, n in search.left.names.items()]
        label.append(f"{left} skipped ({'; '.join(kinds)})")
    return ", ".join((*label, _readable(size_bytes)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _name(paths: Sequence[str]) -> str:
    if not paths:
        return "Python {}.{} standard library".format(*sys.version_info)
    if len(paths) > 1:
        return f"{len(paths)} paths"
    if paths[0] == pipes.STDIN:
        return "standard input"
    is_folder = os.path.isdir(Path(paths[0]).expanduser()) and not paths[0].endswith("/")
    return printable(paths[0]) + ("/" if is_folder else "")


def _readable(size_bytes: int) -> str:
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size = size_bytes / 1000
    for unit in ("kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
