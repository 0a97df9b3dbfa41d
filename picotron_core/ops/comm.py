"""The contract of `comm`: torch's collectives, by torch's names, over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

ReduceOp = Literal["sum", "max", "min"]
Group = Any  # whatever the backend's `new_group` returned; None means all ranks


class Work(Protocol):
    """A collective under way. After `wait()` the tensors may be read and reused."""

    def wait(self) -> None: ...


class Comm(Protocol):
    """Collectives over `group` (None: every rank). Each returns a `Work`; without `async_op` it is
    already done. Ranks of `src` and `dst` are global, and in the group. Shapes, dtypes and the
    order of calls must agree on all ranks of the group. Tensors are contiguous, and a group's order
    is that of the ranks, however it was named. No average: the caller divides, so that the sum is
    exact for integers and the division happens once.

    A ValueError on the rank that asks for it, before anything is on its way: a strided tensor, an
    unknown `op`, a `src` or `dst` outside of the group, oneself as the peer of `send` or `recv`,
    and any call over a group that the calling rank is not in.
    """

    def start(
        self, *, store: Any, rank: int, world_size: int, device: torch.device, timeout_s: float
    ) -> None:
        """Form the group of all ranks over `store` (a torch rendezvous store)."""

    def stop(self) -> None:
        """Leave all groups; a no-op where `start` was not called."""

    def new_group(self, ranks: Sequence[int]) -> Group:
        """A subgroup. Every rank calls it, members or not, in the same order. To a rank that is no
        member it is of no use, but it is not None, which would mean all ranks.
        """

    def all_reduce(
        self, tensor: Tensor, *, op: ReduceOp = "sum", group: Group = None, async_op: bool = False
    ) -> Work:
        """In place: tensor <- op over ranks."""

    def all_gather_into_tensor(
        self, output: Tensor, tensor: Tensor, *, group: Group = None, async_op: bool = False
    ) -> Work:
        """output (world * n, ...) <- the ranks' tensors (n, ...), in rank order."""

    def reduce_scatter_tensor(
        self,
        output: Tensor,
        tensor: Tensor,
        *,
        op: ReduceOp = "sum",
        group: Group = None,
        async_op: bool = False,
    ) -> Work:
        """output (n, ...) <- this rank's slice of op over ranks of tensor (world * n, ...)."""

    def broadcast(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        """In place: tensor <- rank `src`'s tensor."""

    def send(
        self, tensor: Tensor, *, dst: int, group: Group = None, async_op: bool = False
    ) -> Work:
        """To rank `dst`, which calls `recv`."""

    def recv(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        """In place: from rank `src`."""

    def barrier(self, *, group: Group = None) -> None:
        """Return once every rank of the group has called it."""
