"""Which text is held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from picotron_core.data.sources import Fragment

Part = Literal["train", "validation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rule, for a text of `total_bytes` bytes of UTF-8."""

    val_fraction: float
    seed: int
    total_bytes: int
    cut: int | None  # the byte of the whole text where validation begins; None: by document


def plan_split(
    fragments: Iterable[Fragment],
    *,
    val_fraction: float,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
    validation: Iterable[Fragment] = (),
) -> Split:
    """Read the documents once and decide how to hold out `val_fraction` of them.

    A document is held out if the hash of (seed, its number) says so. Where that leaves a side
    empty, as with one long file, the last `val_fraction` of the text is held out instead. Where
    text is given for validation, it follows the documents, and nothing is held out of these.

    Args:
        progress: called with the bytes of text read so far.
    """
    number = total_bytes = 0
    used: set[Part] = set()
    for text, last in fragments:
        used.add(_part(number, val_fraction, seed))
        number += last
        total_bytes += len(text.encode())
        progress(total_bytes)
    train_bytes = total_bytes
    for text, _ in validation:
        total_bytes += len(text.encode())
        progress(total_bytes)
    cut = None if len(used) == 2 else round(total_bytes * (1 - val_fraction))
    if total_bytes > train_bytes:
        cut = train_bytes
    return Split(val_fraction=val_fraction, seed=seed, total_bytes=total_bytes, cut=cut)


def parted(fragments: Iterable[Fragment], split: Split) -> Iterator[tuple[Part, str, bool]]:
    """The text with the side that it is on, in order, and whether it ends a document there. The
    document across a cut becomes two.
    """
    if split.cut is None:
        number = 0
        for text, last in fragments:
            yield _part(number, split.val_fraction, split.seed), text, last
            number += last
        return
    before = 0
    unended: Part | None = None  # the side on which a document has begun
    for text, last in fragments:
        encoded = text.encode()
        # Bytes of half a character at the cut are left to the tail.
        head = encoded[: max(split.cut - before, 0)].decode(errors="ignore")
        tail = text[len(head) :]
        before += len(encoded)
        if head:
            yield "train", head, last and not tail
            unended = "train"
        if tail:
            if unended == "train":
                yield "train", "", True
            yield "validation", tail, last
            unended = "validation"
        if last:
            if unended and not text:
                yield unended, "", True
            unended = None


def _part(number: int, val_fraction: float, seed: int) -> Part:
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    chance = int.from_bytes(digest, "big") / 2**64
    return "validation" if chance < val_fraction else "train"
