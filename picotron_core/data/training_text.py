"""What a tokenizer is trained on: a bounded part of the text, with a bounded number of words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

# Memory that the trainer takes, measured with random words: bytes for each distinct word, and for
# each byte of it.
WORD_COST = 500
BYTE_COST = 75
WORDS_BUDGET = 80_000_000

# The words of the byte-level pre-tokenizer, by the nearest expression that Python knows.
_WORD = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def sampled(pieces: Iterable[str], *, keep: float, seed: int) -> Iterator[str]:
    """A share of the pieces, spread evenly over them.

    Args:
        keep: the share of the text, by characters.
        seed: of the place of the first piece.
    """
    if keep >= 1:
        yield from pieces
        return
    phase = (seed * 0.6180339887498949) % 1.0
    due = None
    for piece in pieces:
        if due is None:
            due = phase * len(piece)
        due += keep * len(piece)
        if due >= len(piece):
            due -= len(piece)
            yield piece


def frequent_words(
    pieces: Iterable[str], *, budget: int = WORDS_BUDGET
) -> tuple[frozenset[str] | None, int]:
    """The most frequent words that a tokenizer can be trained on within a budget of memory.

    Returns: (words, or None where all are within it; how many distinct words were dropped, at
        least).
    """
    counts: Counter[str] = Counter()
    cost = dropped = 0
    for piece in pieces:
        found = Counter(_WORD.findall(piece))
        cost += sum(map(_cost, found.keys() - counts.keys()))
        counts.update(found)
        if cost > 2 * budget:
            before = len(counts)
            counts, cost = _most_frequent(counts, budget)
            dropped += before - len(counts)
    if cost > budget:
        before = len(counts)
        counts, cost = _most_frequent(counts, budget)
        dropped += before - len(counts)
    return (frozenset(counts), dropped) if dropped else (None, 0)


def _most_frequent(counts: Counter[str], budget: int) -> tuple[Counter[str], int]:
    kept: Counter[str] = Counter()
    total = 0
    for word, count in counts.most_common():  # among equals the one that came first
        cost = _cost(word)
        if total + cost <= budget:
            kept[word] = count
            total += cost
    return kept, total


def _cost(word: str) -> int:
    return WORD_COST + BYTE_COST * len(word.encode())


def only_words(pieces: Iterable[str], words: frozenset[str]) -> Iterator[str]:
    """The text without other words: the runs of these between them."""
    for piece in pieces:
        for known, run in groupby(_WORD.findall(piece), words.__contains__):
            if known:
                yield "".join(run)
