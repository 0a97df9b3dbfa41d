"""What cannot be right is refused, on every rank, before anything is on its way; starting and
stopping; and time that runs out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from picotron_conformance.check import WrongKernelError
from picotron_conformance.ranks.calls import (
    COLLECTIVES,
    EVERY,
    Begin,
    How,
    all_reduce,
    recv,
    send,
)
from picotron_conformance.ranks.groups import group_of
from picotron_conformance.ranks.rank import Rank
from picotron_conformance.surroundings import CHANGED, put_back
from picotron_core.errors import PicotronError

# How a kernel may say no. Not AssertionError or IndexError: those are accidents.
REFUSALS = (ValueError, TypeError, RuntimeError, PicotronError)

TIMEOUT_S = 3.0  # what `timeouts` is started with


def _refused(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except REFUSALS:
        return
    raise WrongKernelError(f"{what} was accepted", hint="an argument that is not looked at")


def wrong_sizes(at: Rank) -> None:
    """Sizes and dtypes that cannot be right; afterwards, what is right still works."""
    gather, scatter = at.comm.all_gather_into_tensor, at.comm.reduce_scatter_tensor
    for too_much in (1, -1, at.world):
        whole = torch.zeros(at.world * 3 + too_much, device=at.device)
        shard = torch.zeros(3, device=at.device)
        _refused(f"a gather of {at.world} x 3 into {len(whole)}", partial(gather, whole, shard))
        _refused(f"a scatter of {len(whole)} into 3", partial(scatter, shard, whole))
    whole = torch.zeros(at.world * 3, device=at.device)
    shard = torch.zeros(3, device=at.device, dtype=torch.int32)
    _refused("a gather of int32 into float32", partial(gather, whole, shard))
    _refused("a scatter of float32 into int32", partial(scatter, shard, whole))
    _still_works(at)


def no_such_peer(at: Rank) -> None:
    """Oneself is no peer, nor is a rank that is not there."""
    tensor = torch.zeros(3, device=at.device)
    for peer in (at.rank, at.world, -1):
        _refused(f"send to {peer} of {at.world}", partial(at.comm.send, tensor, dst=peer))
        _refused(f"recv from {peer} of {at.world}", partial(at.comm.recv, tensor, src=peer))
    for src in (at.world, -1):
        _refused(f"broadcast from {src} of {at.world}", partial(at.comm.broadcast, tensor, src=src))
    _refused(f"a group with {at.world}", partial(at.comm.new_group, [0, at.world]))
    _still_works(at)


def outside_group(at: Rank) -> None:
    """A peer that is not in the group is refused by its members; and a call over the group, by who
    is not in it: what does nothing there would go unseen.
    """
    outsider = at.world - 1
    members = group_of(at, *range(outsider))
    tensor, group = torch.zeros(3, device=at.device), members.group
    if at.rank in members.ranks:
        among = f"among ranks {list(members.ranks)}"
        for name, call in (
            ("broadcast from", partial(at.comm.broadcast, tensor, src=outsider)),
            ("send to", partial(at.comm.send, tensor, dst=outsider)),
            ("recv from", partial(at.comm.recv, tensor, src=outsider)),
        ):
            for async_op in (False, True):
                _refused(
                    f"{name} rank {outsider} {among}",
                    partial(call, group=group, async_op=async_op),
                )
    else:
        whole = torch.zeros(3 * outsider, device=at.device)
        calls: tuple[tuple[str, Callable[..., Any]], ...] = (
            ("all_reduce", partial(at.comm.all_reduce, tensor)),
            ("all_gather_into_tensor", partial(at.comm.all_gather_into_tensor, whole, tensor)),
            ("reduce_scatter_tensor", partial(at.comm.reduce_scatter_tensor, tensor, whole)),
            ("broadcast", partial(at.comm.broadcast, tensor, src=0)),
            ("send", partial(at.comm.send, tensor, dst=0)),
            ("recv", partial(at.comm.recv, tensor, src=0)),
            ("barrier", at.comm.barrier),
        )
        for name, begin in calls:
            what = f"{name} of rank {at.rank} over a group of {list(members.ranks)}"
            _refused(what, partial(begin, group=group))
    _still_works(at)


def no_such_op(at: Rank) -> None:
    """Only sum, max and min are in the contract: an average that is a sum would go unseen."""
    tensor = torch.zeros(2, device=at.device)
    whole = torch.zeros(2 * at.world, device=at.device)
    op: Any = "avg"
    _refused("all_reduce(op='avg')", partial(at.comm.all_reduce, tensor, op=op))
    scatter = partial(at.comm.reduce_scatter_tensor, tensor, whole, op=op)
    _refused("reduce_scatter_tensor(op='avg')", scatter)
    group = group_of(at, *range(at.world)).group
    for call in (partial(at.comm.all_reduce, tensor, op=op), scatter):
        _refused("op='avg' in a group", partial(call, group=group))
        _refused("asynchronous op='avg'", partial(call, async_op=True))
    _still_works(at)


def strided(at: Rank) -> None:
    """Strided tensors, on all ranks alike: right, with nothing beside them touched, or refused."""
    calls: list[Begin] = list(EVERY.values())
    if at.world > 1:
        calls += [_ring]
    for layout in ("strided", "transposed"):
        for salt, begin in enumerate(calls):
            try:
                begin(at, How((3, 4), layout=layout, salt=salt)).finish()
            except REFUSALS:
                continue
    _still_works(at)


def _ring(at: Rank, how: How) -> Any:
    sent = send(at, How(how.shape, layout=how.layout, async_op=True), dst=(at.rank + 1) % at.world)
    got = recv(at, how, src=(at.rank - 1) % at.world)
    sent.finish()
    return got


def restarts(at: Rank) -> None:
    """After `stop`, and again `stop`, the kernel starts over a new store and works as before."""
    members = group_of(at, *range(0, at.world, 2))
    if at.rank in members.ranks:
        all_reduce(at, How((4,), members=members)).finish()
    for name in (f"again-{at.number}", f"and-again-{at.number}"):
        at.comm.stop()
        at.comm.stop()
        at.start(name)
        _still_works(at)
        members = group_of(at, *range(0, at.world, 2))
        if at.rank in members.ranks:
            all_reduce(at, How((4,), members=members)).finish()


def globals_unchanged(at: Rank) -> None:
    """Random states, the default dtype, threads and flags are as before the kernel was loaded."""
    _still_works(at)
    at.comm.barrier()
    if changed := put_back(at.outside):
        raise WrongKernelError(f"the kernel changed {', '.join(changed)}", hint=CHANGED)


def timeouts(at: Rank) -> None:
    """A call that others never join raises once `timeout_s` is over, in a subgroup as well: torch
    gives those half an hour of their own. Ends the world: its ranks are out of step.
    """
    members = group_of(at, *range(at.world))
    if at.rank > 0:
        if not at.sees(["over"], within_s=5 * TIMEOUT_S):
            raise WrongKernelError(f"rank 0 waits for longer than its {TIMEOUT_S:g} s, and goes on")
        return
    started = time.monotonic()
    try:
        all_reduce(at, How((5,), members=members)).finish()
    except WrongKernelError:
        raise
    except Exception as error:  # noqa: BLE001 - however it says so
        if time.monotonic() - started < TIMEOUT_S / 2:
            raise WrongKernelError(f"it gave up early, with {error}") from None
    else:
        raise WrongKernelError("all_reduce returned although no other rank had called it")
    finally:
        at.mark("over")


def _still_works(at: Rank) -> None:
    for begin in COLLECTIVES.values():
        begin(at, How((3,))).finish()
