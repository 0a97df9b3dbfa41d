"""The collectives as calls that check themselves: begun by all members alike, finished by each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from picotron_conformance.check import WrongKernelError
from picotron_conformance.ranks.payload import Guarded, Shape, guarded, payload, reduced
from picotron_conformance.ranks.rank import Members, Rank
from picotron_core.ops.comm import ReduceOp, Work

POISON = 99  # in outputs, before


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A call under way. `finish` waits, then finds every number right and all else unchanged."""

    what: str
    work: Work
    result: Guarded
    wanted: Tensor
    own: Tensor  # what this rank contributed
    source: Guarded | None = None  # where that is not where the result goes

    def finish(self) -> None:
        self.work.wait()
        self.check()

    def check(self) -> None:
        self.result.check_in_place(self.what)
        found = self.result.tensor.detach().cpu()
        if found.dtype != self.wanted.dtype or found.shape != self.wanted.shape:
            raise WrongKernelError(
                f"{self.what}: the tensor became {found.dtype} {tuple(found.shape)}"
            )
        if not torch.equal(found, self.wanted):
            raise WrongKernelError(
                f"{self.what}: {difference(found, self.wanted)}", hint=self._looks_like(found)
            )
        self.result.check_edges(self.what)
        if self.source is not None:
            self.source.check_unchanged(self.what)

    def reuse(self) -> None:
        """Overwrite the tensors, as their owner may once they have been waited for."""
        self.result.tensor.zero_()
        if self.source is not None:
            self.source.tensor.zero_()

    def _looks_like(self, found: Tensor) -> str:
        wanted = self.wanted
        if torch.equal(found, self.own):
            return "the rank's own numbers: nothing has come from the others yet, or ever"
        if torch.equal(found.flatten().sort().values, wanted.flatten().sort().values):
            return "the right numbers at wrong places: the order of ranks, or the layout"
        if (found == wanted).any() and found.dim() == 1:
            return "right in part: a tail that is lost, or read before it is complete"
        return "numbers of too few bits, an average for a sum, or those of other ranks"


@dataclass(frozen=True, slots=True)
class How:
    """What all calls have in common. `members`: None means all ranks."""

    shape: Shape
    members: Members | None = None
    async_op: bool = False
    layout: str = "dense"
    salt: int = 0  # other numbers


Begin = Callable[[Rank, How], Pending]


def all_reduce(at: Rank, how: How, *, op: ReduceOp = "sum") -> Pending:
    members = how.members or at.all
    own = _payload(at, how, at.rank)
    place = guarded(own, at.device, layout=how.layout)
    return Pending(
        what=_named(f"all_reduce({op})", at, how),
        work=at.comm.all_reduce(place.tensor, op=op, group=members.group, async_op=how.async_op),
        result=place,
        wanted=reduced((_payload(at, how, rank) for rank in members.ranks), op),
        own=own,
    )


def all_gather(at: Rank, how: How) -> Pending:
    members = how.members or at.all
    own = _payload(at, how, at.rank)
    wanted = torch.cat([_payload(at, how, rank) for rank in members.ranks])
    source = guarded(own, at.device, layout=how.layout)
    result = guarded(torch.full_like(wanted, POISON), at.device, layout=how.layout)
    return Pending(
        what=_named("all_gather_into_tensor", at, how),
        work=at.comm.all_gather_into_tensor(
            result.tensor, source.tensor, group=members.group, async_op=how.async_op
        ),
        result=result,
        wanted=wanted,
        own=own,
        source=source,
    )


def reduce_scatter(at: Rank, how: How, *, op: ReduceOp = "sum") -> Pending:
    """The shape is the shard's."""
    members = how.members or at.all
    n = how.shape[0]
    whole = replace(how, shape=(len(members.ranks) * n, *how.shape[1:]))
    own = _payload(at, whole, at.rank)
    mine = slice(members.ranks.index(at.rank) * n, (members.ranks.index(at.rank) + 1) * n)
    wanted = reduced((_payload(at, whole, rank) for rank in members.ranks), op)[mine]
    source = guarded(own, at.device, layout=how.layout)
    result = guarded(torch.full_like(wanted, POISON), at.device, layout=how.layout)
    return Pending(
        what=_named(f"reduce_scatter_tensor({op})", at, how),
        work=at.comm.reduce_scatter_tensor(
            result.tensor, source.tensor, op=op, group=members.group, async_op=how.async_op
        ),
        result=result,
        wanted=wanted,
        own=own[mine],
        source=source,
    )


def broadcast(at: Rank, how: How, *, src: int | None = None) -> Pending:
    """From the last member where no `src` is given."""
    members = how.members or at.all
    src = members.ranks[-1] if src is None else src
    own = _payload(at, how, at.rank)
    place = guarded(own, at.device, layout=how.layout)
    return Pending(
        what=_named(f"broadcast(src={src})", at, how),
        work=at.comm.broadcast(place.tensor, src=src, group=members.group, async_op=how.async_op),
        result=place,
        wanted=_payload(at, how, src),
        own=own,
    )


def send(at: Rank, how: How, *, dst: int) -> Pending:
    members = how.members or at.all
    own = _payload(at, how, at.rank)
    place = guarded(own, at.device, layout=how.layout)
    return Pending(
        what=_named(f"send(dst={dst})", at, how),
        work=at.comm.send(place.tensor, dst=dst, group=members.group, async_op=how.async_op),
        result=place,
        wanted=own,
        own=own,
        source=place,
    )


def recv(at: Rank, how: How, *, src: int) -> Pending:
    members = how.members or at.all
    wanted = _payload(at, how, src)
    place = guarded(torch.full_like(wanted, POISON), at.device, layout=how.layout)
    return Pending(
        what=_named(f"recv(src={src})", at, how),
        work=at.comm.recv(place.tensor, src=src, group=members.group, async_op=how.async_op),
        result=place,
        wanted=wanted,
        own=torch.full_like(wanted, POISON),
    )


COLLECTIVES: Mapping[str, Begin] = {
    "all-reduce": all_reduce,
    "all-reduce-max": partial(all_reduce, op="max"),
    "all-gather": all_gather,
    "reduce-scatter": reduce_scatter,
    "broadcast": broadcast,
}
EVERY: Mapping[str, Begin] = {  # with every op
    **COLLECTIVES,
    "all-reduce-min": partial(all_reduce, op="min"),
    "reduce-scatter-max": partial(reduce_scatter, op="max"),
    "reduce-scatter-min": partial(reduce_scatter, op="min"),
}
MOVING = ("all-gather", "broadcast")  # those of EVERY that take bool too


def both_ways(at: Rank, how: How, calls: Iterable[Begin]) -> None:
    """Each call for itself; then asynchronously, all at once."""
    calls = tuple(calls)
    for begin in calls:
        begin(at, how).finish()
    for pending in [begin(at, replace(how, async_op=True)) for begin in calls]:
        pending.finish()


def round_the_ring(at: Rank, how: How) -> None:
    """Messages from each member to the next: one rank after the other, then all at once, so that
    they cross.
    """
    ranks = (how.members or at.all).ranks
    place = ranks.index(at.rank)
    ways: list[Begin] = [
        partial(send, dst=ranks[(place + 1) % len(ranks)]),
        partial(recv, src=ranks[place - 1]),
    ]
    for begin in ways if place == 0 else ways[::-1]:
        begin(at, how).finish()
    at_once = replace(how, async_op=True, salt=how.salt + 50)
    for pending in [begin(at, at_once) for begin in ways]:
        pending.finish()


def difference(found: Tensor, wanted: Tensor) -> str:
    """The first place that differs, and how many do."""
    wrong = found != wanted
    if wrong.dim() == 0:
        return f"{found.item()}, must be {wanted.item()}"
    index = tuple(wrong.nonzero()[0].tolist())
    return (
        f"at {list(index)} {found[index].item()}, must be {wanted[index].item()}; "
        f"{int(wrong.sum())} of {wrong.numel()} are wrong"
    )


def _payload(at: Rank, how: How, rank: int) -> Tensor:
    return _kept_payload(rank, how.shape, at.dtype, how.salt)


@lru_cache(maxsize=16)  # it is asked for by several calls in turn, and nobody writes to it
def _kept_payload(rank: int, shape: Shape, dtype: torch.dtype, salt: int) -> Tensor:
    return payload(rank, shape, dtype, salt=salt)


def _named(call: str, at: Rank, how: How) -> str:
    among = "" if how.members is None else f" among ranks {list(how.members.ranks)}"
    dtype = str(at.dtype).removeprefix("torch.")
    layout = "" if how.layout == "dense" else f"{how.layout} "
    return f"{call} of {layout}{dtype} {list(how.shape)}{among}"
