"""Which text is held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["train", "validation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rule, for a text of `total_bytes` bytes of UTF-8."""

    val_fraction: float
    seed: int
    total_bytes: int
    cut: int | None  # the byte of the whole text where validation begins; None: by document


def plan_split(
    documents: Iterable[str],
    *,
    val_fraction: float,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Split:
    """Read the documents once and decide how to hold out `val_fraction` of them.

    A document is held out if the hash of (seed, its number) says so. Where that leaves a side
    empty, as with one long file, the last `val_fraction` of the text is held out instead.

    Args:
        progress: called with the bytes of text read so far.
    """
    total_bytes = 0
    used: set[Part] = set()
    for number, text in enumerate(documents):
        used.add(_part(number, val_fraction, seed))
        total_bytes += len(text.encode())
        progress(total_bytes)
    cut = None if len(used) == 2 else round(total_bytes * (1 - val_fraction))
    return Split(val_fraction=val_fraction, seed=seed, total_bytes=total_bytes, cut=cut)


def parted(documents: Iterable[str], split: Split) -> Iterator[tuple[Part, str]]:
    """The documents with the side that each is on, in order. The one across a cut becomes two."""
    if split.cut is None:
        for number, text in enumerate(documents):
            yield _part(number, split.val_fraction, split.seed), text
        return
    before = 0
    for text in documents:
        encoded = text.encode()
        # Bytes of half a character at the cut are left to the tail.
        head = encoded[: max(split.cut - before, 0)].decode(errors="ignore")
        tail = text[len(head) :]
        if head:
            yield "train", head
        if tail:
            yield "validation", tail
        before += len(encoded)


def _part(number: int, val_fraction: float, seed: int) -> Part:
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    chance = int.from_bytes(digest, "big") / 2**64
    return "validation" if chance < val_fraction else "train"
