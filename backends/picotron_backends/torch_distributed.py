"""The collectives of torch.distributed: one kernel under `gloo-cpu` and `nccl`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from picotron_backends.collectives import Done, check_op, check_shards
from picotron_core.errors import BackendError
from picotron_core.ops.comm import Comm, Group, ReduceOp, Work
from picotron_core.parallel.network import on_loopback

# torch 2.13 renamed these two and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def comm_over(transport: str) -> Comm:
    """The kernel over "gloo" or "nccl".

    Raises: BackendError where the installed torch was built without it.
    """
    built_in = dist.is_available() and (
        dist.is_nccl_available() if transport == "nccl" else dist.is_gloo_available()
    )
    if not built_in:
        raise BackendError(
            f"{transport} was asked for, but torch {torch.__version__} was built without it. "
            "Install a build of torch that has it."
        )
    return TorchComm(transport)


@dataclass(slots=True)
class TorchComm:
    """Keeps the contract of `comm` by torch's default process group, which `start` forms. To start
    again after `stop` takes a new store: the old one holds the addresses of the old group.

    `timeout` is what `start` was given: torch would let subgroups wait for half an hour.
    """

    transport: str
    timeout: timedelta | None = None

    def start(
        self, *, store: Any, rank: int, world_size: int, device: torch.device, timeout_s: float
    ) -> None:
        self.timeout = timedelta(seconds=timeout_s)
        with _loopback_only() if world_size == 1 else nullcontext():
            dist.init_process_group(
                self.transport,
                store=HashStore() if store is None and world_size == 1 else store,
                rank=rank,
                world_size=world_size,
                timeout=self.timeout,
                device_id=device if device.type == "cuda" else None,
            )

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def new_group(self, ranks: Sequence[int]) -> Group:
        return dist.new_group(list(ranks), timeout=self.timeout)

    def all_reduce(
        self, tensor: Tensor, *, op: ReduceOp = "sum", group: Group = None, async_op: bool = False
    ) -> Work:
        check_op(op)
        _check_contiguous(tensor)
        _check_member(group)
        return dist.all_reduce(tensor, _REDUCE[op], group, async_op) or Done()

    @torch.no_grad()
    def all_gather_into_tensor(
        self, output: Tensor, tensor: Tensor, *, group: Group = None, async_op: bool = False
    ) -> Work:
        _check_member(group)
        check_shards(output, tensor, dist.get_world_size(group))
        return _all_gather(output, tensor, group, async_op) or Done()

    @torch.no_grad()
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
        _check_member(group)
        check_shards(tensor, output, dist.get_world_size(group))
        if self.transport == "gloo":
            return _settle(_exchange_and_reduce(output, tensor, op, group), async_op)
        return _reduce_scatter(output, tensor, _REDUCE[op], group, async_op) or Done()

    def broadcast(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        _check_contiguous(tensor)
        _check_inside(src, group)
        return dist.broadcast(tensor, src, group, async_op) or Done()

    def send(
        self, tensor: Tensor, *, dst: int, group: Group = None, async_op: bool = False
    ) -> Work:
        _check_peer(dst, group)
        return _settle(dist.isend(tensor, dst, group), async_op)

    def recv(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        _check_peer(src, group)
        return _settle(dist.irecv(tensor, src, group), async_op)

    def barrier(self, *, group: Group = None) -> None:
        _check_member(group)
        dist.barrier(group)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """A process that is alone opens a port all the same: nobody else is to reach it."""
    names = on_loopback()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _exchange_and_reduce(output: Tensor, tensor: Tensor, op: ReduceOp, group: Group) -> Reduction:
    """gloo has no reduce_scatter: torch makes it of an all_reduce, which sends twice as much. Here
    every rank gets its slice from each, and reduces them itself, in their order.
    """
    slices = torch.empty_like(tensor)
    # as bytes, for not every dtype may travel
    sent, received = (t.view(-1).view(torch.uint8) for t in (tensor, slices))
    work = dist.all_to_all_single(received, sent, group=group, async_op=True)
    ranks = dist.get_world_size(group)
    return Reduction(work, slices.view(ranks, *output.shape), output, op)


@dataclass(slots=True)
class Reduction:
    """Slices on their way, which `wait` reduces into `output`."""

    work: Any
    slices: Tensor | None
    output: Tensor
    op: ReduceOp

    @torch.no_grad()
    def wait(self) -> None:
        if self.slices is None:
            return
        self.work.wait()
        if self.op == "sum":
            torch.sum(self.slices, 0, dtype=self.output.dtype, out=self.output)
        else:
            (torch.amax if self.op == "max" else torch.amin)(self.slices, 0, out=self.output)
        self.slices = None


def _check_contiguous(tensor: Tensor) -> None:
    if not tensor.is_contiguous():  # gloo would take the memory as if it were, neighbours included
        raise ValueError(f"a tensor of strides {tensor.stride()}; comm needs it contiguous")


def _check_member(group: Group) -> None:
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # torch would warn, and do nothing
        raise ValueError(f"rank {dist.get_rank()} calls over a group that it is not in")


def _check_inside(rank: int, group: Group) -> None:
    _check_member(group)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if rank not in ranks:
        raise ValueError(f"rank {rank} is not among those of the group, {ranks}")


def _check_peer(peer: int, group: Group) -> None:
    _check_inside(peer, group)
    if peer == dist.get_rank():  # gloo would wait for it until the timeout
        raise ValueError(f"rank {peer} is no peer of its own, to send to or hear from")


def _settle(work: Any, async_op: bool) -> Work:
    """The work itself where it may go on, else one that is done: gloo's cannot be waited twice."""
    if not async_op:
        work.wait()
        return Done()
    under_way: Work = work
    return under_way
