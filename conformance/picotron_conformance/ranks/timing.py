"""Who waits for whom: proven by the order of events, with a rank that comes late."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from picotron_conformance.check import WrongKernelError
from picotron_conformance.ranks.calls import (
    COLLECTIVES,
    EVERY,
    Begin,
    How,
    Pending,
    all_reduce,
    broadcast,
    recv,
    send,
)
from picotron_conformance.ranks.rank import Members, Rank

PATIENCE_S = 10.0  # for an event that a right kernel cannot prevent
LINGER_S = 0.05  # the late rank's: time for others to be wrong in; right ones pass whatever it is


def late_ranks(at: Rank) -> None:
    """A call that is not asynchronous returns with its result, however late another rank comes."""
    _with_late_ranks(at, async_op=False)


def early_waits(at: Rank) -> None:
    """An asynchronous call returns before the others come, and its `wait` only after."""
    _with_late_ranks(at, async_op=True)


def _with_late_ranks(at: Rank, *, async_op: bool) -> None:
    how = How((7,), async_op=async_op)
    for late in dict.fromkeys((at.world - 1, 0)):
        for name, begin in (EVERY if at.large else COLLECTIVES).items():
            begin = partial(broadcast, src=late) if name == "broadcast" else begin
            one_is_late(at, late, name, begin, how)
        early = (late + 1) % at.world
        if at.rank in (late, early):
            begin = partial(send, dst=early) if at.rank == late else partial(recv, src=late)
            one_is_late(at, late, "message", begin, how, others=[early])
            begin = partial(recv, src=early) if at.rank == late else partial(send, dst=late)
            one_is_late(at, late, "message-to", begin, how, others=[early], needed=False)
        begin = partial(broadcast, src=early)
        one_is_late(at, late, "broadcast-to", begin, how, needed=False)


def one_is_late(
    at: Rank,
    late: int,
    call: str,
    begin: Begin,
    how: How,
    *,
    others: Sequence[int] = (),
    needed: bool = True,
) -> None:
    """All members begin a call, `late` last.

    others: who calls it beside `late`, where that is not all other members.
    needed: the others cannot be done before `late` has come. If it only receives, they may be,
        and use their tensors again.
    """
    members = how.members or at.all
    others = others or [rank for rank in members.ranks if rank != late]
    name = f"{call}-{late}-{'async' if how.async_op else 'sync'}"
    if at.rank == late:
        came = at.sees([f"{name}-called-{rank}" for rank in others], within_s=PATIENCE_S)
        if not came:
            raise WrongKernelError(
                f"{name}: the others' call has not returned although async_op=True",
                hint="async_op is ignored: nothing overlaps, and pipelines deadlock",
            )
        time.sleep(LINGER_S)
        at.mark(f"{name}-late")
        begin(at, how).finish()
        return
    if not how.async_op:
        at.mark(f"{name}-called-{at.rank}")
    pending = begin(at, how)
    if how.async_op:
        at.mark(f"{name}-called-{at.rank}")
        pending.work.wait()
    if needed and not at.sees([f"{name}-late"]):
        raise WrongKernelError(
            f"{pending.what}: {'wait()' if how.async_op else 'it'} returned before rank {late} had "
            "called it, so without its numbers",
            hint="a wait that does not wait",
        )
    if not how.async_op:  # gloo's work cannot be waited for twice
        pending.work.wait()
    pending.check()
    pending.reuse()


def together(at: Rank) -> None:
    """Many under way at once, of all kinds and sizes; ranks wait for them in different orders."""
    how = How((9,), async_op=True)
    under_way: list[Pending] = []
    for salt, shape in enumerate(((3,), (3,), (1025,), (2, 3))):
        for begin in COLLECTIVES.values():
            under_way.append(begin(at, How(shape, async_op=True, salt=salt)))
    if at.world > 1:
        under_way.append(recv(at, how, src=(at.rank - 1) % at.world))
        under_way.append(send(at, how, dst=(at.rank + 1) % at.world))
    for pending in under_way if at.rank % 2 else reversed(under_way):
        pending.work.wait()
    for pending in under_way:
        pending.check()


def barriers(at: Rank) -> None:
    """Behind a barrier, everything has happened that any rank did before it."""
    pass_barriers(at, at.all)
    all_reduce(at, How((3,))).finish()


def pass_barriers(at: Rank, members: Members) -> None:
    """As many barriers as there are members; each of them comes late to one."""
    for late in members.ranks:
        near = {rank: f"near-{late}-{rank}" for rank in members.ranks}
        if at.rank == late:
            others = [event for rank, event in near.items() if rank != late]
            at.sees(others, within_s=PATIENCE_S)
            time.sleep(LINGER_S if others else 0)
        at.mark(near[at.rank])
        at.comm.barrier(group=members.group)
        missing = [rank for rank, event in near.items() if not at.sees([event])]
        if missing:
            raise WrongKernelError(
                f"barrier of ranks {list(members.ranks)} returned before rank {missing[0]} had "
                "called it",
                hint="a barrier that does nothing, or of another group",
            )
