"""Data parallelism: every rank has all weights and its share of the batch."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from picotron_core.ops import Comm


def sum_over_ranks(tensors: Iterable[Tensor], comm: Comm) -> None:
    """In place, each tensor becomes its sum over the ranks of the dp axis."""
    # after backward: all_reduce(sum) over dp, all in flight at once
    for work in [comm.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()
