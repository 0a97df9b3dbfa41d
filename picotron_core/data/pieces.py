"""Text in pieces of bounded length: what is encoded at a time, and what a tokenizer trains on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from picotron_core.data.split import Part

PIECE_CHARS = 1 << 16  # a longer document is encoded in pieces, on many cores
BATCH_CHARS = 1 << 19  # text in flight; each character costs the encoder 100 to 200 bytes
SAMPLE_CHARS = 1 << 12  # of a piece to train a tokenizer on: hundreds of them are in flight

Piece = tuple[Part, str, bool]  # the side, the text, and whether it ends its document there

# After a line end, or before a space, between characters that are neither: there a byte-level
# pre-tokenizer ends a word whether or not more text follows.
_BETWEEN_WORDS = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")


def batches(text: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces to encode, in batches of BATCH_CHARS or a little more."""
    batch: list[Piece] = []
    waiting = 0
    for piece in encodable(text):
        batch.append(piece)
        waiting += len(piece[1])
        if waiting >= BATCH_CHARS:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def encodable(text: Iterable[Piece]) -> Iterator[Piece]:
    """Cut a long document after a line end, or where it has none, after PIECE_CHARS.

    The pieces are those of the document, however it came in parts.
    """
    held: dict[Part, str] = {}
    for part, more, last in text:
        rest = held.pop(part, "") + more
        start = 0
        while len(rest) - start > PIECE_CHARS:
            end = rest.rfind("\n", start, start + PIECE_CHARS) + 1
            end = end if end > start else start + PIECE_CHARS
            yield part, rest[start:end], False
            start = end
        if last:
            yield part, rest[start:], True
        else:
            held[part] = rest[start:]


def for_training(text: Iterable[Piece]) -> Iterator[str]:
    """The text of the training side in short pieces, cut where it changes no word if possible."""
    for part, piece, _ in encodable(text):
        if part != "train":
            continue
        start = 0
        while len(piece) - start > SAMPLE_CHARS:
            # The last place in the second half; a text without one is cut anywhere.
            places = _BETWEEN_WORDS.finditer(piece, start + SAMPLE_CHARS // 2, start + SAMPLE_CHARS)
            end = max((place.start() for place in places), default=start + SAMPLE_CHARS)
            yield piece[start:end]
            start = end
        if start < len(piece):
            yield piece[start:]
