"""Is every number right, at every size, asynchronously too? One question per collective."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

import torch

from picotron_conformance.check import WrongKernelError
from picotron_conformance.ranks.calls import (
    How,
    all_gather,
    all_reduce,
    both_ways,
    broadcast,
    difference,
    recv,
    reduce_scatter,
    round_the_ring,
    send,
)
from picotron_conformance.ranks.payload import Shape, payload, reduced
from picotron_conformance.ranks.rank import Rank
from picotron_conformance.rounding import UNIT
from picotron_core.ops.comm import ReduceOp

LARGE = 500_009  # elements: more than gloo moves at once


def shapes(at: Rank) -> Iterator[Shape]:
    """No elements, fewer than ranks, one more, more than a buffer; and up to three dims."""
    for n in dict.fromkeys((0, 1, at.world - 1, at.world + 1, 1025)):
        yield (n,)
    yield from ((2, 3), (3, 1, 5), (0, 4))
    if at.large:
        yield (LARGE,)


def _ops(shape: Shape) -> tuple[ReduceOp, ...]:
    return ("sum",) if shape == (LARGE,) else ("sum", "max", "min")


def reduces(at: Rank) -> None:
    for salt, shape in enumerate(((), *shapes(at))):
        calls = [partial(all_reduce, op=op) for op in _ops(shape)]
        both_ways(at, How(shape, salt=salt), calls)


def gathers(at: Rank) -> None:
    for salt, shape in enumerate(shapes(at)):
        both_ways(at, How(shape, salt=salt), [all_gather])


def scatters(at: Rank) -> None:
    for salt, shape in enumerate(shapes(at)):
        calls = [partial(reduce_scatter, op=op) for op in _ops(shape)]
        both_ways(at, How(shape, salt=salt), calls)


def broadcasts(at: Rank) -> None:
    for salt, shape in enumerate(((), *shapes(at))):
        calls = [partial(broadcast, src=src) for src in range(at.world)]
        both_ways(at, How(shape, salt=salt), calls)


def passes_on(at: Rank) -> None:
    """Messages round the ring, of every size."""
    for salt, shape in enumerate(((), *shapes(at))):
        round_the_ring(at, How(shape, salt=salt))


def messages_in_order(at: Rank) -> None:
    """Several from one rank to another do not overtake, whatever their sizes."""
    for shape in ((4,), (70_000,)):
        for dst in range(at.world):
            src = (dst + 1) % at.world
            hows = [How(shape, salt=salt, async_op=True) for salt in range(6)]
            if at.rank == src:
                pending = [send(at, how, dst=dst) for how in hows]
            elif at.rank == dst:
                pending = [recv(at, how, src=src) for how in hows]
            else:
                continue
            for message in pending:
                message.finish()


def rounds(at: Rank) -> None:
    """Random numbers: within the error of any order of summing, and on all ranks the same bits."""
    unit = UNIT[at.dtype]
    for number, shape in enumerate(((1025,), (3, 7))):
        whole = (at.world * shape[0], *shape[1:])
        drawn = [_drawn(at, rank, whole, number) for rank in range(at.world)]
        exact = torch.stack(drawn).double().sum(0)
        size = torch.stack(drawn).double().abs().sum(0)
        limit = (at.world - 1) * unit * size + unit * exact.abs()
        total = drawn[at.rank].to(at.device, copy=True)
        at.comm.all_reduce(total).wait()
        part = torch.full(shape, torch.nan, dtype=at.dtype, device=at.device)
        at.comm.reduce_scatter_tensor(part, drawn[at.rank].to(at.device)).wait()
        mine = slice(at.rank * shape[0], (at.rank + 1) * shape[0])
        for call, found, where in (
            ("all_reduce", total.cpu(), slice(None)),
            ("reduce_scatter_tensor", part.cpu(), mine),
        ):
            error = (found.double() - exact[where]).abs()
            if not (error <= limit[where]).all():
                raise WrongKernelError(
                    f"{call} of random {at.dtype}: {float((error / limit[where]).max()):.3g} times "
                    "the error that summing in any order can make",
                    hint="sums in a dtype of fewer bits, or a rank that counts twice",
                )
        _same_on_all(at, total.cpu(), f"random-{number}")


def _drawn(at: Rank, rank: int, shape: Shape, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(at.seed * 1000 + number * 10 + rank)
    return torch.randn(shape, generator=generator).to(at.dtype)


def _same_on_all(at: Rank, total: torch.Tensor, event: str) -> None:
    bits = hashlib.sha256(total.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    at.mark(f"{event}-{at.rank}", bits)
    for rank in at.others():
        if at.hears(f"{event}-{rank}") != bits:
            raise WrongKernelError(
                f"all_reduce: ranks {at.rank} and {rank} got different bits",
                hint="each rank sums in an order of its own: replicas of a model drift apart",
            )


def many_calls(at: Rank) -> None:
    """Hundreds of calls of ever other sizes: right at first is not enough."""
    for number in range(200 if at.large else 60):
        how = How((number * 7 % 41 + 1,), salt=number)
        for begin in (all_reduce, all_gather, reduce_scatter, broadcast):
            begin(at, how).finish()


def kept_results(at: Rank) -> None:
    """What an earlier call gave is not touched by later ones, of the same or another size."""
    begun = [
        begin(at, How(shape, salt=salt))
        for salt, shape in enumerate(((5,), (5,), (2, 8), (5,), (1025,)))
        for begin in (all_reduce, all_gather, reduce_scatter, broadcast)
    ]
    for pending in begun:
        pending.work.wait()
    for pending in begun:
        pending.check()


def not_numbers(at: Rank) -> None:
    """A NaN or an infinity of one rank reaches all: training looks for overflow by it. What is
    moved keeps its bits, those of NaN, of -0 and of subnormal numbers included.
    """
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1.0, torch.inf]).to(at.dtype)
    odd[4] = torch.finfo(at.dtype).smallest_normal / 4
    last = at.world - 1
    total = (odd if at.rank == last else torch.ones_like(odd)).to(at.device, copy=True)
    total[-1] = -torch.inf if at.rank == 0 else torch.inf  # NaN, if more than one rank
    at.comm.all_reduce(total).wait()
    found = [float(x) for x in total[[0, 1, 2, 5]]]
    wanted = [torch.nan, torch.inf, -torch.inf, torch.nan if last else -torch.inf]
    if str(found) != str(wanted):
        raise WrongKernelError(
            f"all_reduce of NaN, inf, -inf of one rank, and inf - inf: {found}, must be {wanted}",
            hint="numbers that are clamped, or sent in a form that has no NaN",
        )
    moved = (odd if at.rank == last else torch.zeros_like(odd)).to(at.device, copy=True)
    gathered = torch.zeros(at.world * len(odd), dtype=at.dtype, device=at.device)
    at.comm.all_gather_into_tensor(gathered, moved).wait()
    at.comm.broadcast(moved, src=last).wait()
    for name, result in (("all_gather_into_tensor", gathered[-6:]), ("broadcast", moved)):
        if not torch.equal(result.cpu().view(torch.uint8), odd.view(torch.uint8)):
            raise WrongKernelError(
                f"{name} of {odd.tolist()}: {result.tolist()}, or other bits",
                hint="numbers that are converted, flushed to zero, or added to zeros",
            )


def leaves(at: Rank) -> None:
    """Weights are leaves that require a gradient; they change in place all the same, and what is
    gathered from them is no part of a graph.
    """
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            leaf = payload(at.rank, (6,), at.dtype).to(at.device).requires_grad_()
            address = leaf.data_ptr()
            at.comm.broadcast(leaf, src=at.world - 1).wait()
            _holds(leaf, payload(at.world - 1, (6,), at.dtype), "broadcast of a leaf")
            at.comm.all_reduce(leaf, op="max").wait()
            _holds(leaf, payload(at.world - 1, (6,), at.dtype), "all_reduce of a leaf")
            gathered = torch.empty(6 * at.world, dtype=at.dtype, device=at.device)
            at.comm.all_gather_into_tensor(gathered, leaf).wait()
            wanted = payload(at.world - 1, (6,), at.dtype).repeat(at.world)
            _holds(gathered, wanted, "all_gather_into_tensor of a leaf")
            part = torch.empty(2, dtype=at.dtype, device=at.device)
            weight = torch.nn.Parameter(payload(at.rank, (2 * at.world,), at.dtype).to(at.device))
            at.comm.reduce_scatter_tensor(part, weight).wait()
            total = reduced(
                (payload(rank, (2 * at.world,), at.dtype) for rank in range(at.world)), "sum"
            )
            _holds(part, total[2 * at.rank :][:2], "reduce_scatter_tensor of a leaf")
        if leaf.data_ptr() != address or not leaf.requires_grad or not leaf.is_leaf:
            raise WrongKernelError(
                "a leaf that requires a gradient became another tensor",
                hint="a result bound to the tensor instead of written to its memory",
            )
        if gathered.requires_grad or part.requires_grad:
            raise WrongKernelError("the output requires a gradient, because the input does")


def _holds(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    now = found.detach().cpu()
    if not torch.equal(now, wanted):
        raise WrongKernelError(f"{what}: {difference(now, wanted)}")
