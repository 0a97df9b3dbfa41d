"""The collectives of a single process: each is a copy or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from picotron_backends.collectives import Done, check_op, check_shards
from picotron_core.ops.comm import Comm, Group, ReduceOp, Work


@dataclass(frozen=True, slots=True)
class OneProcess:
    """Keeps the contract of `comm` for a world of one; holds nothing and starts nothing."""

    def start(
        self, *, store: Any, rank: int, world_size: int, device: torch.device, timeout_s: float
    ) -> None:
        if (rank, world_size) != (0, 1):
            raise ValueError(f"local comm is for rank 0 of 1, not for rank {rank} of {world_size}")

    def stop(self) -> None:
        return None

    def new_group(self, ranks: Sequence[int]) -> Group:
        if list(ranks) != [0]:
            raise ValueError(f"a group of ranks {list(ranks)} in a world of one: only [0] is there")
        return None

    def all_reduce(
        self, tensor: Tensor, *, op: ReduceOp = "sum", group: Group = None, async_op: bool = False
    ) -> Work:
        check_op(op)
        return Done()

    def all_gather_into_tensor(
        self, output: Tensor, tensor: Tensor, *, group: Group = None, async_op: bool = False
    ) -> Work:
        return _copy(output, tensor)

    def reduce_scatter_tensor(
        self,
        output: Tensor,
        tensor: Tensor,
        *,
        op: ReduceOp = "sum",
        group: Group = None,
        async_op: bool = False,
    ) -> Work:
        check_op(op)
        return _copy(output, tensor)

    def broadcast(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        if src != 0:
            raise ValueError(f"broadcast from rank {src} in a world of one")
        return Done()

    def send(
        self, tensor: Tensor, *, dst: int, group: Group = None, async_op: bool = False
    ) -> NoReturn:
        raise ValueError(f"send to rank {dst}, but a world of one has nobody to send to")

    def recv(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> NoReturn:
        raise ValueError(f"recv from rank {src}, but a world of one has nobody to hear from")

    def barrier(self, *, group: Group = None) -> None:
        return None


@torch.no_grad()
def _copy(output: Tensor, tensor: Tensor) -> Work:
    check_shards(output, tensor, 1)
    output.copy_(tensor.reshape(output.shape))
    return Done()


COMM: Comm = OneProcess()
