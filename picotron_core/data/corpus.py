"""The text: files, folders, a hub dataset, or the standard library of the Python that runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from picotron_core.data.sources import Source, file_source, hub_source
from picotron_core.errors import DataError

# What is read out of a folder; a file that is named outright may have any suffix.
SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm"),
    *(".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh"),
    *(".java", ".kt", ".scala", ".go", ".rs", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".css"),
    *(".rb", ".php", ".pl", ".lua", ".swift", ".r", ".jl", ".hs", ".ml", ".ex", ".erl", ".clj"),
    *(".sh", ".bash", ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".json", ".xml", ".csv"),
    *(".jsonl", ".jsonl.gz", ".parquet"),
)

# Folders of the standard library that hold tests, other people's code, or programs beside it.
NOT_LIBRARY = {
    *("site-packages", "dist-packages", "lib-dynload", "ensurepip", "lib2to3", "__phello__"),
    *("test", "tests", "idle_test", "idlelib", "turtledemo"),
}

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents in a stable order. `label` is one line for a log; `size_bytes` is as stored."""

    label: str
    size_bytes: int
    sources: tuple[Source, ...]

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in order; may be read any number of times."""
        for source in self.sources:
            for text in source.documents():
                if text.strip():
                    yield text

    def fingerprint(self) -> str:
        """Hex digest of the content: equal where the documents are, wherever the files lie."""
        return hashlib.sha256("\n".join(s.digest for s in self.sources).encode()).hexdigest()


def open_corpus(paths: Sequence[str], *, text_field: str = "text", split: str = "train") -> Corpus:
    """Find the text that is meant, and read it through once to know that it is there.

    Args:
        paths: text files, folders (recursive; hidden and binary files are left out), .jsonl,
            .jsonl.gz, .parquet, or names of Hugging Face datasets; none means the source of the
            running Python's standard library.
        text_field: the field or column that holds the text.
        split: the split of a Hugging Face dataset.

    Raises: DataError if a path is missing or unreadable, is not UTF-8, lacks the field, or if
        all is blank.
    """
    sources: list[Source] = []
    skipped = 0
    for path in paths:
        for source in _sources(path, text_field, split):
            if source is None:
                skipped += 1
            else:
                sources.append(source)
    if not paths:
        for file in _standard_library():
            source = file_source(file, text_field=text_field, explicit=False)
            sources += [] if source is None else [source]
    size_bytes = sum(source.size_bytes for source in sources)
    files = f"{len(sources)} file{'' if len(sources) == 1 else 's'}"
    skips = f" ({skipped} skipped: not UTF-8 text)" if skipped else ""
    corpus = Corpus(
        label=f"{_name(paths)}, {files}{skips}, {_readable(size_bytes)}",
        size_bytes=size_bytes,
        sources=tuple(sources),
    )
    if next(corpus.documents(), None) is None:
        raise DataError(
            f"The corpus is empty: no text in {', '.join(paths) or _name(paths)}{skips}. "
            "Name files that hold text with --data.paths."
        )
    return corpus


def _sources(name: str, text_field: str, split: str) -> Iterator[Source | None]:
    path = Path(name).expanduser()
    if name and os.path.isdir(path):  # unlike Path.is_dir, never raises
        for file in _text_files(path):
            yield file_source(file, text_field=text_field, explicit=False)
    elif name and os.path.exists(path):
        yield file_source(path, text_field=text_field, explicit=True)
    elif not HUB_NAME.fullmatch(name) or name.lower().endswith(SUFFIXES):
        raise DataError(f"No file or folder {name!r}. Check --data.paths.")
    elif importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"No file or folder {name!r}. Check --data.paths; if it is a Hugging Face dataset, "
            "pip install 'picotron[data]' first."
        )
    else:
        yield hub_source(name, text_field=text_field, split=split)


def _text_files(folder: Path) -> Iterator[Path]:
    """Sorted by path, so that every machine and every run sees the same order."""

    def unreadable(error: OSError) -> None:
        raise DataError(f"Cannot read the folder {error.filename}: {error.strerror}.") from None

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            hidden = name.startswith(".")
            if not hidden and name.lower().endswith(SUFFIXES) and path.is_file():
                yield path


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in _text_files(root)
        if path.suffix == ".py"
        and not path.name.startswith("_sysconfigdata")  # made by the build: paths and flags
        and not NOT_LIBRARY.intersection(path.relative_to(root).parts)
    ]


def _name(paths: Sequence[str]) -> str:
    if not paths:
        return "Python {}.{} standard library".format(*sys.version_info)
    return paths[0] if len(paths) == 1 else f"{len(paths)} paths"


def _readable(size_bytes: int) -> str:
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size = size_bytes / 1000
    for unit in ("kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
