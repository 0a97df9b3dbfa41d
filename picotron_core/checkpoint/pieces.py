"""Who has what, and who writes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from picotron_core.checkpoint.header import MASTER
from picotron_core.checkpoint.manifest import Degrees
from picotron_core.engine.state import TrainState
from picotron_core.parallel.mesh import AXES
from picotron_core.parallel.piece import Piece


def held(state: TrainState) -> dict[str, Piece]:
    """By parameter, the part of it that this rank updates."""
    spans = {name: state.weights.span(name) for name in state.masters}
    return {name: state.layout.piece(name, span) for name, span in spans.items()}


def written(state: TrainState) -> dict[str, Piece]:
    """By parameter, the part that this rank writes: all ranks together write each number once."""
    mine = {name: piece for name, piece in held(state).items() if state.layout.counts(name)}
    return mine if state.weights.divided else _share(mine, state)


def _share(mine: dict[str, Piece], state: TrainState) -> dict[str, Piece]:
    """Of what all ranks of the data axis have alike, an equal part for each, end to end."""
    axis = state.layout.mesh.data
    total = sum(piece.size for piece in mine.values())
    begin, end = (total * index // axis.size for index in (axis.index, axis.index + 1))
    shared, first = {}, 0
    for name, piece in mine.items():
        low, high = max(begin, first), min(end, first + piece.size)
        if low < high:
            low, high = (piece.low + place - first for place in (low, high))
            shared[name] = replace(piece, low=low, high=high)
        first += piece.size
    return shared


def tensors(state: TrainState) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Everything that is kept: ("master" or a moment's name, parameter -> this rank's tensor)."""
    yield MASTER, state.masters
    yield from state.moments.items()


def degrees_of(state: TrainState) -> Degrees:
    """The layout of the ranks that hold the state."""
    mesh = state.layout.mesh
    sizes = {name: getattr(mesh, name).size for name in AXES}
    return Degrees(**sizes, zero=int(state.weights.divided))


def numbers_of(tensor: Tensor, held: Piece, wanted: Piece) -> Tensor:
    """A flat view of those numbers of a rank's tensor that `wanted`, a part of `held`, names."""
    return tensor.detach().view(-1)[wanted.low - held.low : wanted.high - held.low]
