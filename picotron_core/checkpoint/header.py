"""The head of a safetensors file, written and read by hand: to write in chunks, and to trust none.

    8 bytes: length of the JSON, little-endian | JSON: name -> dtype, shape, offsets | the numbers

The library wants all tensors in memory to write a file, and trusts a header of 100 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from typing import Any

from picotron_core.errors import RunError
from picotron_core.parallel.piece import Piece

LIMIT = 1 << 20  # bytes of JSON; parsed they take up to 25 times as much
FLOAT32_BYTES = 4
META = "__metadata__"
MASTER = "master"  # the kind of tensor that every piece has; the moments' names are the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a rank's file says of itself.

    pieces: parameter -> the part of it that the file holds, of each kind of tensor.
    offsets: (kind, parameter) -> where its numbers begin in the file, in bytes.
    notes: text by name: the random generators' states.
    """

    pieces: Mapping[str, Piece]
    offsets: Mapping[tuple[str, str], int]
    notes: Mapping[str, str]


def encode(
    pieces: Mapping[str, Piece],
    kinds: Sequence[str],
    *,
    shapes: Mapping[str, Sequence[int]],
    notes: Mapping[str, str],
) -> bytes:
    """The bytes before the numbers, which follow in the order kind by kind, piece by piece.

    A part of a parameter is flat; a whole one has its shape, for whoever opens the file elsewhere.

    Raises: RunError for so many tensors that no reader would accept the header.
    """
    places = {
        name: [piece.row, piece.start, piece.stop, piece.width, piece.low, piece.high]
        for name, piece in pieces.items()
    }
    described: dict[str, Any] = {META: {"format": "pt", **notes, "pieces": json.dumps(places)}}
    end = 0
    for kind in kinds:
        for name, piece in pieces.items():
            begin, end = end, end + FLOAT32_BYTES * piece.size
            described[f"{kind}.{name}"] = {
                "dtype": "F32",
                "shape": list(shapes[name]) if piece.is_whole else [piece.size],
                "data_offsets": [begin, end],
            }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LIMIT:
        raise RunError(
            f"This rank has parts of {len(pieces)} parameters: more than a checkpoint's file may "
            f"name in {LIMIT} bytes. Divide the layers among more stages with --parallel.pp."
        )
    return len(text).to_bytes(8, "little") + text


def decode(file: FileIO, size: int, shapes: Mapping[str, Sequence[int]]) -> Header:
    """Read and check the header of an open file of `size` bytes. Nothing large is allocated.

    Args:
        shapes: of the whole parameters, as the manifest has them.

    Raises: ValueError that says what is wrong.
    """
    length = int.from_bytes(_read(file, 8), "little")
    if not 2 <= length <= min(LIMIT, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    described = parse(_read(file, length))
    meta = described.pop(META, None)
    if not isinstance(meta, dict) or not all(isinstance(text, str) for text in meta.values()):
        raise ValueError("no metadata")
    places = parse(meta.get("pieces", "").encode())
    pieces = {name: _piece(name, numbers, shapes) for name, numbers in places.items()}
    spans = sorted((_span(name, entry), name) for name, entry in described.items())
    offsets, end = {}, 0
    for (begin, stop), key in spans:
        kind, _, name = key.partition(".")
        if name not in pieces or stop - begin != FLOAT32_BYTES * pieces[name].size:
            raise ValueError(f"{key[:80]!r} is of another size than its piece")
        if begin != end:  # a gap could hide anything, an overlap would be two tensors in one
            raise ValueError(f"{key[:80]!r} does not begin where the tensor before it ends")
        offsets[kind, name] = 8 + length + begin
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"its tensors take {8 + length + end} bytes, the file has {size}")
    if any((MASTER, name) not in offsets for name in pieces):
        raise ValueError("a piece without its numbers")
    notes = {name: text for name, text in meta.items() if name not in ("format", "pieces")}
    return Header(pieces=pieces, offsets=offsets, notes=notes)


def parse(text: bytes) -> dict[str, Any]:
    """A JSON object, of a text whose length is already bounded.

    Raises: ValueError for anything else: two equal keys, NaN, or more brackets than Python nests.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _piece(name: str, numbers: Any, shapes: Mapping[str, Sequence[int]]) -> Piece:
    if name not in shapes or not isinstance(numbers, list) or len(numbers) != 6:
        raise ValueError(f"no piece of a parameter: {name[:80]!r}")
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"the piece of {name[:80]!r} is not of whole numbers")
    row, start, stop, width, low, high = numbers
    numel = prod(shapes[name])
    return Piece(numel=numel, row=row, start=start, stop=stop, width=width, low=low, high=high)


def _span(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} is described otherwise than safetensors does")
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(offsets) != 2:
        raise ValueError(f"shape or offsets of {name[:80]!r} are no whole numbers")
    begin, end = offsets
    if entry["dtype"] != "F32" or end - begin != FLOAT32_BYTES * prod(shape):
        raise ValueError(f"{name[:80]!r} is not float32, or its shape and offsets differ")
    return begin, end


def _read(file: FileIO, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = file.read(count - len(found))
        if not more:
            raise ValueError("it ends in its header")
        found += more
    return found
