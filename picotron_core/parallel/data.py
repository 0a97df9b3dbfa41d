"""Data parallelism: every rank has all weights and its share of the batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from picotron_core.ops import Comm


def sum_over_ranks(
    tensors: Iterable[Tensor], comm: Comm, *, dtype: torch.dtype | None = None
) -> None:
    """In place, each tensor becomes its sum over the ranks of the dp axis.

    dtype: what float32 tensors travel in, where that is not their own.
    """
    tensors = list(tensors)
    sent = [t.to(dtype) if dtype and t.dtype == torch.float32 else t for t in tensors]
    # after backward: all_reduce(sum) over dp, all in flight at once
    for work in [comm.all_reduce(tensor, async_op=True) for tensor in sent]:
        work.wait()
    for tensor, total in zip(tensors, sent, strict=True):
        if total is not tensor:
            tensor.copy_(total)
