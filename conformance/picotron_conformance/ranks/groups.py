"""Subgroups: their members alone take part, in rank order, and nobody waits for the rest."""

from __future__ import annotations

import torch

from picotron_conformance.check import WrongKernelError
from picotron_conformance.ranks.calls import (
    EVERY,
    MOVING,
    How,
    all_gather,
    all_reduce,
    both_ways,
    broadcast,
    recv,
    round_the_ring,
    send,
)
from picotron_conformance.ranks.rank import Members, Rank
from picotron_conformance.ranks.timing import PATIENCE_S, one_is_late, pass_barriers


def group_of(at: Rank, *ranks: int) -> Members:
    """A new group. Every rank calls this, in the same order."""
    return Members(tuple(sorted(ranks)), at.comm.new_group(ranks))


def not_all(at: Rank) -> Members:
    """A group without rank 0, where that leaves two of them."""
    return group_of(at, *range(1 if at.world > 2 else 0, at.world))


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
            both_ways(at, How(shape, members=members, salt=salt), EVERY.values())
            for src in members.ranks:
                broadcast(at, How(shape, members=members, salt=salt), src=src).finish()
        at.comm.barrier(group=members.group)
    all_gather(at, How((3,))).finish()


def group_dtypes(at: Rank) -> None:
    """In a group as among all ranks: every call, of every dtype, of few numbers and of many."""
    members = not_all(at)
    if at.rank in members.ranks:
        calls = [EVERY[name] for name in (MOVING if at.dtype == torch.bool else EVERY)]
        long = 70_001 if at.large else 1025
        for salt, shape in enumerate(((0,), (5,), (3, 1, 2), (long,))):
            how = How(shape, members=members, salt=salt)
            both_ways(at, how, calls)
            round_the_ring(at, how)
    all_gather(at, How((3,))).finish()


def group_order(at: Rank) -> None:
    """A group that is named in another order is the same group: results are in rank order."""
    members = group_of(at, *reversed(range(at.world)))
    for begin in EVERY.values():
        begin(at, How((3, 2), members=members)).finish()


def group_messages(at: Rank) -> None:
    """Peers are global ranks inside a subgroup too; a message of a group stays in it."""
    members = group_of(at, *range(1, at.world))
    pair = (at.world - 1, at.world - 2)  # from the last to the one before it
    for shape in ((4,), (70_000,)):
        inside = How(shape, members=members, async_op=True, salt=1)
        outside = How(shape, async_op=True, salt=2)
        begun = []
        if at.rank == pair[0]:
            begun = [send(at, inside, dst=pair[1]), send(at, outside, dst=pair[1])]
        elif at.rank == pair[1]:  # the later first: two groups are two lines
            begun = [recv(at, outside, src=pair[0]), recv(at, inside, src=pair[0])]
        for pending in begun:
            pending.finish()
    all_reduce(at, How((3,))).finish()


def group_late(at: Rank) -> None:
    """In a group too, no call has its result before the last member has come."""
    members = not_all(at)
    late = members.ranks[-1]
    for async_op in (False, True) if at.rank in members.ranks else ():
        how = How((7,), members=members, async_op=async_op)
        for name in EVERY if at.large else ("all-reduce", "all-gather", "reduce-scatter"):
            one_is_late(at, late, name, EVERY[name], how)
    all_reduce(at, How((5,))).finish()


def group_barriers(at: Rank) -> None:
    """A group's barrier waits for all of its members, and for nobody else."""
    members = not_all(at)
    if at.rank in members.ranks:
        pass_barriers(at, members)
        at.mark(f"done-{at.rank}")
    else:
        _waits_for_none(at, members)
    all_reduce(at, How((5,))).finish()


def groups_apart(at: Rank) -> None:
    """A group does not wait for a rank that is not in it: here, one that comes when it is done."""
    outsider = 1
    members = group_of(at, *(rank for rank in range(at.world) if rank != outsider))
    if at.rank == outsider:
        _waits_for_none(at, members)
    else:
        for begin in EVERY.values():
            begin(at, How((5,), members=members)).finish()
        at.comm.barrier(group=members.group)
        at.mark(f"done-{at.rank}")
    all_reduce(at, How((5,))).finish()


def _waits_for_none(at: Rank, members: Members) -> None:
    """This rank, who is not in the group, comes when its members are done."""
    if not at.sees([f"done-{rank}" for rank in members.ranks], within_s=PATIENCE_S):
        raise WrongKernelError(
            f"ranks {list(members.ranks)} wait for rank {at.rank}, who is not in their group",
            hint="the group is ignored",
        )
