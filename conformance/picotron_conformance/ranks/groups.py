"""Subgroups: their members alone take part, in rank order, and nobody waits for the rest."""

from __future__ import annotations

from picotron_conformance.check import WrongKernelError
from picotron_conformance.ranks.calls import (
    COLLECTIVES,
    How,
    all_gather,
    all_reduce,
    broadcast,
    recv,
    send,
)
from picotron_conformance.ranks.rank import Members, Rank
from picotron_conformance.ranks.timing import PATIENCE_S


def group_of(at: Rank, *ranks: int) -> Members:
    """A new group. Every rank calls this, in the same order."""
    return Members(tuple(sorted(ranks)), at.comm.new_group(ranks))


def subgroups(at: Rank) -> None:
    """Groups side by side, each with its own numbers, its own source, and all of the calls."""
    everyone = list(range(at.world))
    side_by_side = [group_of(at, *everyone[first::2]) for first in range(min(2, at.world))]
    neighbours = [group_of(at, *everyone[i : i + 2]) for i in range(0, at.world, 2)]
    alone = [group_of(at, rank) for rank in everyone]
    for salt, members in enumerate((*side_by_side, *neighbours, *alone)):
        if at.rank not in members.ranks:
            continue
        for shape in ((5,), (2, 3), (1025,)):
            for begin in COLLECTIVES.values():
                begin(at, How(shape, members=members, salt=salt)).finish()
                begin(at, How(shape, members=members, salt=salt, async_op=True)).finish()
            for src in members.ranks:
                broadcast(at, How(shape, members=members, salt=salt), src=src).finish()
        at.comm.barrier(group=members.group)
    all_gather(at, How((3,))).finish()


def group_order(at: Rank) -> None:
    """A group that is named in another order is the same group: results are in rank order."""
    members = group_of(at, *reversed(range(at.world)))
    for begin in COLLECTIVES.values():
        begin(at, How((3, 2), members=members)).finish()


def group_messages(at: Rank) -> None:
    """Peers are global ranks inside a subgroup too; a message of a group stays in it."""
    members = group_of(at, *range(1, at.world))
    pair = (at.world - 1, at.world - 2)  # from the last to the one before it
    if at.rank == pair[0]:
        begun = [
            send(at, How((4,), members=members, async_op=True, salt=1), dst=pair[1]),
            send(at, How((4,), async_op=True, salt=2), dst=pair[1]),
        ]
    elif at.rank == pair[1]:
        begun = [  # the later first: two groups are two lines
            recv(at, How((4,), async_op=True, salt=2), src=pair[0]),
            recv(at, How((4,), members=members, async_op=True, salt=1), src=pair[0]),
        ]
    else:
        begun = []
    for pending in begun:
        pending.finish()
    all_reduce(at, How((3,))).finish()


def groups_apart(at: Rank) -> None:
    """A group does not wait for a rank that is not in it: here, one that comes when it is done."""
    outsider = 1
    members = group_of(at, *(rank for rank in range(at.world) if rank != outsider))
    if at.rank == outsider:
        done = [f"done-{rank}" for rank in members.ranks]
        if not at.sees(done, within_s=PATIENCE_S):
            raise WrongKernelError(
                f"ranks {list(members.ranks)} wait for rank {outsider}, who is not in their group",
                hint="the group is ignored",
            )
    else:
        for begin in COLLECTIVES.values():
            begin(at, How((5,), members=members)).finish()
        at.comm.barrier(group=members.group)
        at.mark(f"done-{at.rank}")
    all_reduce(at, How((5,))).finish()
