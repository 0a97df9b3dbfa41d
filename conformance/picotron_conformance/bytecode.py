"""Caches of bytecode that are not what their sources say.

Python runs the cache in `__pycache__` and not the source, wherever the cache's header says that it
fits (PEP 552): so whoever writes a cache with the right header replaces a module, and no hash of
the sources shows it. Here every cache that Python would run is compared with its compiled source.
"""

from __future__ import annotations

import marshal
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash
from pathlib import Path
from types import CodeType

# The flags in a header, PEP 552: what tells that the source is still the one it was made of.
BY_TIME, UNCHECKED, BY_HASH = 0b00, 0b01, 0b11
OPTIMIZATIONS = {"": 0, "1": 1, "2": 2}  # by their mark in the file's name: python, -O, -OO


def forged(paths: Iterable[Path]) -> Iterator[str]:
    """What is wrong with the caches of these files, a line each."""
    for source in paths:
        if source.suffix != ".py":
            continue
        own = {
            Path(cache_from_source(source, optimization=mark)): optimize
            for mark, optimize in OPTIMIZATIONS.items()
        }
        folder = next(iter(own)).parent
        for cache in sorted(folder.glob("*.pyc")):
            if cache.name.partition(".")[0] == source.stem:
                why = _unchecked(cache) or _other(cache, source, own.get(cache))
                if why:
                    yield f"{cache} {why}"


def _unchecked(cache: Path) -> str:
    """Of any Python: it runs such a one even after the source was changed."""
    with cache.open("rb") as file:
        flags = file.read(8)[4:]
    unchecked = int.from_bytes(flags, "little") == UNCHECKED
    return "is run without a look at its source (an unchecked hash)" if unchecked else ""


def _other(cache: Path, source: Path, optimize: int | None) -> str:
    """None for `optimize`: made for another Python, or by a tool that only reads it itself."""
    content, text = cache.read_bytes(), source.read_bytes()
    if optimize is None or not _is_run(content, source, text):
        return ""
    try:
        cached = marshal.loads(content[16:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = compile(text, str(source), "exec", dont_inherit=True, optimize=optimize)
    except (ValueError, EOFError, TypeError, SyntaxError):
        return "cannot be read"
    same = isinstance(cached, CodeType) and _bare(cached) == _bare(right)
    return "" if same else "is not what its source compiles to"


def _is_run(content: bytes, source: Path, text: bytes) -> bool:
    """Whether this Python takes the cache for that of the source, rather than compile anew."""
    flags, stamp = int.from_bytes(content[4:8], "little"), content[8:16]
    if content[:4] != MAGIC_NUMBER:
        return False
    if flags == BY_TIME:
        state = source.stat()
        fits = (int(state.st_mtime) & 0xFFFFFFFF, state.st_size & 0xFFFFFFFF)
        return stamp == b"".join(number.to_bytes(4, "little") for number in fits)
    return flags == BY_HASH and stamp == source_hash(text)


def _bare(code: CodeType) -> CodeType:
    """Without positions in the source: whether columns are kept is an option of Python's."""
    constants = tuple(_bare(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=constants, co_linetable=b"")
