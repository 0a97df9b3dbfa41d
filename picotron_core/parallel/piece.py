"""Which numbers of a whole parameter a rank has: the geometry that layouts and checkpoints share.

    whole (rows of `row`)        | . . a b c . | . . d e f . |
    columns [start, stop)        a b c 0 | d e f 0              filled up to `width`
    of these, [low, high)            b c 0 | d e

One form for all: a slice of tensor parallelism is some columns, ZeRO's shard is a range that begins
and ends anywhere, and a shard of a slice is both.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """numel: of the whole. All else as above; low and high count the filled-up numbers as well.

    Raises: ValueError for numbers that describe no part of such a tensor.
    """

    numel: int
    row: int
    start: int
    stop: int
    width: int
    low: int
    high: int

    def __post_init__(self) -> None:
        right = (
            0 < self.row <= self.numel
            and self.numel % self.row == 0
            and 0 <= self.start <= self.stop <= self.row
            and 0 < self.width <= self.row
            and self.stop - self.start <= self.width
            and 0 <= self.low < self.high <= self.numel // self.row * self.width
        )
        if not right:
            raise ValueError(f"{self} is no part of a tensor")

    @property
    def size(self) -> int:
        """Numbers in it, the filling included."""
        return self.high - self.low

    @property
    def is_whole(self) -> bool:
        return self.size == self.numel == self.stop - self.start

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(place in the whole, place in the piece, count) of its numbers, in order; no filling."""
        filled = self.stop - self.start
        for number in range(self.low // self.width, -(-self.high // self.width)):
            first = number * self.width
            begin, end = max(self.low, first), min(self.high, first + filled)
            if begin < end:
                yield number * self.row + self.start + begin - first, begin - self.low, end - begin


def whole(numel: int) -> Piece:
    """All of a tensor."""
    return Piece(numel=numel, row=numel, start=0, stop=numel, width=numel, low=0, high=numel)


def common(mine: Piece, theirs: Piece) -> Iterator[tuple[int, int, int]]:
    """(place in mine, place in theirs, count) of the numbers that two pieces of a tensor share."""
    if mine.row == theirs.row and (mine.stop <= theirs.start or theirs.stop <= mine.start):
        return  # other columns: without this, slices of a large matrix are compared row by row
    left, right = mine.runs(), theirs.runs()
    a, b = next(left, None), next(right, None)
    while a and b:
        begin, end = max(a[0], b[0]), min(a[0] + a[2], b[0] + b[2])
        if begin < end:
            yield a[1] + begin - a[0], b[1] + begin - b[0], end - begin
        if a[0] + a[2] == end:
            a = next(left, None)
        else:
            b = next(right, None)


def covered_once(pieces: Iterable[Piece], numel: int) -> bool:
    """Whether the pieces hold each of a tensor's numbers, and none twice."""
    end = 0
    for place, _, count in heapq.merge(*(piece.runs() for piece in pieces)):
        if place != end:
            return False
        end += count
    return end == numel
