"""One thing that a pipeline stage does."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """A forward or a backward of one micro-batch through one of the stage's chunks of layers."""

    kind: Literal["forward", "backward"]
    micro_batch: int
    chunk: int = 0


def forward(micro_batch: int, chunk: int = 0) -> Action:
    return Action("forward", micro_batch, chunk)


def backward(micro_batch: int, chunk: int = 0) -> Action:
    return Action("backward", micro_batch, chunk)
