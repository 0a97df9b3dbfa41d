"""What a run says over its collectives: a `comm` that notes every call and passes it on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from picotron_core.ops import Comm
from picotron_core.ops.comm import Group, ReduceOp, Work


@dataclass(slots=True, kw_only=True)
class Call:
    """One collective of this rank.

    ranks: in its group. moved: bytes that this rank must send at the least, see `bytes_sent`.
    start_ns, wait_ns, end_ns: by `time.monotonic_ns`: when it was asked for, when this rank began
        to wait for it, and when it was done; 0 where it has not come so far.
    """

    op: str
    ranks: tuple[int, ...]
    dtype: str
    moved: int
    start_ns: int
    wait_ns: int = 0
    end_ns: int = 0


def bytes_sent(op: str, size: int, ranks: int) -> int:
    """What the best algorithm makes each of `ranks` send, on average, of a tensor of `size` bytes
    (the larger one, where there are two).

    An all_reduce is a reduce_scatter and an all_gather, in each of which a rank sends all but its
    own part once (Chan et al. 2007, "Collective communication", section 3).
    """
    others = size * (ranks - 1)
    if op == "all_reduce":
        return 2 * others // ranks
    if op in ("all_gather", "reduce_scatter", "broadcast"):
        return others // ranks
    return size if op == "send" else 0


@dataclass(slots=True)
class NotedWork:
    work: Work
    call: Call

    def wait(self) -> None:
        self.call.wait_ns = time.monotonic_ns()
        self.work.wait()
        self.call.end_ns = time.monotonic_ns()


@dataclass(slots=True)
class NotedComm:
    """Keeps the contract of `comm` by another's keeping it; `calls` holds what was asked."""

    comm: Comm
    calls: list[Call] = field(default_factory=list)
    _everyone: tuple[int, ...] = ()
    _groups: list[tuple[Group, tuple[int, ...]]] = field(default_factory=list)

    def start(
        self, *, store: Any, rank: int, world_size: int, device: torch.device, timeout_s: float
    ) -> None:
        self._everyone = tuple(range(world_size))
        self.comm.start(
            store=store, rank=rank, world_size=world_size, device=device, timeout_s=timeout_s
        )

    def stop(self) -> None:
        self.comm.stop()

    def new_group(self, ranks: Sequence[int]) -> Group:
        group = self.comm.new_group(ranks)
        self._groups.append((group, tuple(ranks)))
        return group

    def all_reduce(
        self, tensor: Tensor, *, op: ReduceOp = "sum", group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("all_reduce", tensor, group)
        return _noted(
            self.comm.all_reduce(tensor, op=op, group=group, async_op=async_op), call, async_op
        )

    def all_gather_into_tensor(
        self, output: Tensor, tensor: Tensor, *, group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("all_gather", output, group)
        work = self.comm.all_gather_into_tensor(output, tensor, group=group, async_op=async_op)
        return _noted(work, call, async_op)

    def reduce_scatter_tensor(
        self,
        output: Tensor,
        tensor: Tensor,
        *,
        op: ReduceOp = "sum",
        group: Group = None,
        async_op: bool = False,
    ) -> Work:
        call = self._note("reduce_scatter", tensor, group)
        work = self.comm.reduce_scatter_tensor(
            output, tensor, op=op, group=group, async_op=async_op
        )
        return _noted(work, call, async_op)

    def broadcast(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("broadcast", tensor, group)
        work = self.comm.broadcast(tensor, src=src, group=group, async_op=async_op)
        return _noted(work, call, async_op)

    def send(
        self, tensor: Tensor, *, dst: int, group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("send", tensor, group)
        return _noted(
            self.comm.send(tensor, dst=dst, group=group, async_op=async_op), call, async_op
        )

    def recv(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("recv", tensor, group)
        return _noted(
            self.comm.recv(tensor, src=src, group=group, async_op=async_op), call, async_op
        )

    def barrier(self, *, group: Group = None) -> None:
        call = self._note("barrier", torch.empty(0), group)
        self.comm.barrier(group=group)
        call.end_ns = time.monotonic_ns()

    def _note(self, op: str, tensor: Tensor, group: Group) -> Call:
        ranks = self._everyone
        if group is not None:
            ranks = next(ranks for known, ranks in self._groups if known is group)
        call = Call(
            op=op,
            ranks=ranks,
            dtype=str(tensor.dtype).removeprefix("torch."),
            moved=bytes_sent(op, tensor.nbytes, len(ranks)),
            start_ns=time.monotonic_ns(),
        )
        self.calls.append(call)
        return call


def _noted(work: Work, call: Call, async_op: bool) -> Work:
    if async_op:
        return NotedWork(work, call)
    call.wait_ns, call.end_ns = call.start_ns, time.monotonic_ns()
    return work
