"""What a run says over its collectives: a `comm` that notes every call and passes it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from picotron_core.ops import Comm
from picotron_core.ops.comm import Group, ReduceOp, Work
from picotron_core.parallel.clock import Stamp
from picotron_core.parallel.mesh import Mesh


@dataclass(slots=True, kw_only=True)
class Call:
    """One collective of this rank.

    axis: of the mesh, where `name_axes` has told; else other.
    ranks: in its group. peer: of a send or a recv.
    size: bytes of its tensor, the larger one where there are two. moved: bytes that this rank must
        send at the least, see `bytes_sent`.
    start, wait, end: when it was asked for, when this rank began to wait for it, and when it knew
        that it was done, by `NotedComm.now`; None where it has not come so far.
    facts: what else was known of it.
    """

    op: str
    axis: str
    ranks: tuple[int, ...]
    dtype: str
    size: int
    moved: int
    start: Stamp
    wait: Stamp | None = None
    end: Stamp | None = None
    peer: int | None = None
    facts: Mapping[str, int | str] = field(default_factory=dict)


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
    now: Callable[[], Stamp]

    def wait(self) -> None:
        self.call.wait = self.now()
        self.work.wait()
        self.call.end = self.now()


@dataclass(slots=True)
class NotedComm:
    """Keeps the contract of `comm` by another's keeping it; `calls` holds what was asked.

    on: whether to note anything. now: nanoseconds of the host, or what else tells the time.
    facts: what is known of a call that is made now.
    """

    comm: Comm
    on: bool = True
    now: Callable[[], Stamp] = time.monotonic_ns
    facts: Callable[[], Mapping[str, int | str]] = dict
    calls: list[Call] = field(default_factory=list)
    _everyone: tuple[int, ...] = ()
    _groups: list[tuple[Group, tuple[int, ...]]] = field(default_factory=list)
    _axes: list[tuple[Group, str]] = field(default_factory=list)

    def name_axes(self, mesh: Mesh) -> None:
        """From here on calls over a group of the mesh bear the name of its axis."""
        axes = (mesh.dp, mesh.pp, mesh.cp, mesh.tp, mesh.data, mesh.back, mesh.ends, mesh.world)
        self._axes = [
            (group, axis.name)
            for axis in axes
            if axis.size > 1
            for group in (axis.group, *axis.lanes)
        ]

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
        work = self.comm.all_reduce(tensor, op=op, group=group, async_op=async_op)
        return self._noted(work, call, async_op)

    def all_gather_into_tensor(
        self, output: Tensor, tensor: Tensor, *, group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("all_gather", output, group)
        work = self.comm.all_gather_into_tensor(output, tensor, group=group, async_op=async_op)
        return self._noted(work, call, async_op)

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
        return self._noted(work, call, async_op)

    def broadcast(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("broadcast", tensor, group)
        work = self.comm.broadcast(tensor, src=src, group=group, async_op=async_op)
        return self._noted(work, call, async_op)

    def send(
        self, tensor: Tensor, *, dst: int, group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("send", tensor, group, peer=dst)
        work = self.comm.send(tensor, dst=dst, group=group, async_op=async_op)
        return self._noted(work, call, async_op)

    def recv(
        self, tensor: Tensor, *, src: int, group: Group = None, async_op: bool = False
    ) -> Work:
        call = self._note("recv", tensor, group, peer=src)
        work = self.comm.recv(tensor, src=src, group=group, async_op=async_op)
        return self._noted(work, call, async_op)

    def barrier(self, *, group: Group = None) -> None:
        call = self._note("barrier", torch.empty(0), group)
        self.comm.barrier(group=group)
        if call:
            call.wait, call.end = call.start, self.now()

    def _note(self, op: str, tensor: Tensor, group: Group, peer: int | None = None) -> Call | None:
        if not self.on:
            return None
        ranks = self._everyone
        if group is not None:
            ranks = next(ranks for known, ranks in self._groups if known is group)
        call = Call(
            op=op,
            axis=next((name for known, name in self._axes if known is group), "other"),
            ranks=ranks,
            dtype=str(tensor.dtype).removeprefix("torch."),
            size=tensor.nbytes,
            moved=bytes_sent(op, tensor.nbytes, len(ranks)),
            start=self.now(),
            peer=peer,
            facts=self.facts(),
        )
        self.calls.append(call)
        return call

    def _noted(self, work: Work, call: Call | None, async_op: bool) -> Work:
        if call is None:
            return work
        if async_op:
            return NotedWork(work, call, self.now)
        call.wait, call.end = call.start, self.now()
        return work
