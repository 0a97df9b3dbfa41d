"""Parts of tensors: by slices, by shards, by both. The reference is a tensor of its own indices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picotron_core.parallel.piece import Piece, common, covered_once, whole


def local(size: int, parts: int, index: int) -> tuple[int, int, int]:
    """Where an equal part begins and ends, and how long it is with its filling."""
    length = -(-size // parts)
    start = min(size, index * length)
    return start, min(size, start + length), length


@st.composite
def layouts(draw):
    """A matrix, how a layout divides it, and each rank's piece with the indices that it holds."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    return (rows, columns), [draw(division(rows, columns)) for _ in range(2)]


@st.composite
def division(draw, rows, columns):
    dim, slices, shards = draw(st.integers(0, 1)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    indices = torch.arange(rows * columns).view(rows, columns)
    found = []
    for index in range(slices):
        size = (rows, columns)[dim]
        start, stop, length = local(size, slices, index)
        filled = torch.full((length, columns) if dim == 0 else (rows, length), -1)
        filled.narrow(dim, 0, stop - start).copy_(indices.narrow(dim, start, stop - start))
        inner = columns if dim == 0 else 1
        for shard in range(shards):
            low, high, _ = local(filled.numel(), shards, shard)
            if low < high:
                piece = Piece(
                    numel=rows * columns,
                    row=size * inner,
                    start=start * inner,
                    stop=stop * inner,
                    width=length * inner,
                    low=low,
                    high=high,
                )
                found.append((piece, filled.flatten()[low:high].tolist()))
    return found


@given(layouts())
def test_every_piece_finds_its_numbers_in_those_of_another_layout(case):
    (rows, columns), (mine, theirs) = case
    assert covered_once([piece for piece, _ in theirs], rows * columns)
    for piece, wanted in mine:
        assert [i for place, _, n in piece.runs() for i in range(place, place + n)] == [
            i for i in wanted if i >= 0
        ]
        found = [-1] * piece.size
        for other, content in theirs:
            for here, there, count in common(piece, other):
                assert found[here : here + count] == [-1] * count
                found[here : here + count] = content[there : there + count]
        assert found == wanted


def test_what_is_missing_or_there_twice_is_seen():
    def part(low, high):
        return Piece(numel=12, row=12, start=0, stop=12, width=12, low=low, high=high)

    assert covered_once([whole(12)], 12)
    assert covered_once([part(5, 12), part(0, 5)], 12)
    assert not covered_once([part(0, 5), part(6, 12)], 12)
    assert not covered_once([part(0, 5), part(4, 12)], 12)
    assert not covered_once([part(0, 11)], 12)
    assert not covered_once([], 12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"row": 0},
        {"row": 5},
        {"start": -1},
        {"stop": 13},
        {"start": 9, "stop": 8},
        {"width": 0},
        {"width": 3},
        {"width": 13},
        {"low": -1},
        {"low": 4, "high": 4},
        {"high": 13},
    ],
)
def test_what_is_no_part_of_a_tensor_is_refused(wrong):
    right = {"numel": 12, "row": 12, "start": 0, "stop": 12, "width": 12, "low": 0, "high": 12}
    with pytest.raises(ValueError, match="no part of a tensor"):
        Piece(**(right | wrong))
