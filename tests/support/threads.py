"""Ranks that are threads of one process: a vote takes no time, and each may have its own disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed import HashStore

from picotron_core.parallel.mesh import Done
from picotron_core.parallel.world import World

PATIENCE_S = 30.0


class Comm:
    """What a saver says to other ranks: all_reduce(max). spoken: how often all ranks have met."""

    def __init__(self, ranks: int) -> None:
        self.spoken = 0
        self._met = threading.Barrier(ranks, self._count, PATIENCE_S)
        self._said: dict[int, torch.Tensor] = {}

    def _count(self) -> None:
        self.spoken += 1

    def new_group(self, ranks):
        return tuple(ranks)

    def all_reduce(self, tensor, *, op, group=None, async_op=False):
        self._said[threading.get_ident()] = tensor.clone()
        self._met.wait()
        if op == "max":
            tensor.copy_(torch.stack(list(self._said.values())).amax(0))
        self._met.wait()  # until all have read, before anyone says more
        return Done()

    def abort(self) -> None:
        self._met.abort()


def on_ranks(ranks: int, work: Callable[[World, Comm], Any]) -> list[Any]:
    """`work(world, comm)` once on each rank; what each returned. Raises the first error of one."""
    comm, store = Comm(ranks), HashStore()

    def rank(number: int) -> Any:
        try:
            world = World(rank=number, size=ranks, store=store, timeout_s=PATIENCE_S)
            return work(world, comm)
        except BaseException:
            comm.abort()  # the others must not wait for this one
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(rank, range(ranks)))
