"""An optimizer's lists: huge ones, those that are loaded anew, and those that are kept for ever."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from picotron_conformance.cases.optimizer import FEW, PLAIN, Updates
from picotron_conformance.check import Record, Target, WrongKernelError, hinted
from picotron_conformance.judge import SMALLEST, Golden
from picotron_conformance.limits import LIMITS
from picotron_conformance.updates import golden, judge_lists, numbers_of, run
from picotron_core.ops.optimizer import STATES

# Limits of torch's multi-tensor kernels: 110 tensors or 320 blocks of 65536 elements a launch.
# Others stop at powers of two. The full profile passes several at once.
ELEMENTS = {"quick": 2**21 + 5, "full": 320 * 65536 + 2**20 + 5}
TENSORS = {"quick": 1200, "full": 5000}
# Every element's update depends on its own numbers alone, so a few are repeated: 1009 is prime, so
# that each falls on every place of a vector or a block.
PERIOD = Updates(name="sizes", shapes=((1009,),), steps=1, state=True)
SMALL = Updates(name="sizes-small", shapes=((3,), (0,), (17,), (5,)), steps=1, state=True)
AT_ONCE = 2**20  # elements that are compared, in float64


def sizes(target: Target, record: Record) -> None:
    """One tensor of more elements, and a list of more tensors, than one launch takes."""
    profile = "quick" if target.profile == "quick" else "full"
    n, count = ELEMENTS[profile], TENSORS[profile]
    numbers = numbers_of(PERIOD, target.seed)

    def long(value: Tensor) -> list[Tensor]:
        narrow = value.float().to(target.device)
        return [narrow.repeat(-(-n // len(value)))[:n]]

    _updated(
        target,
        [
            long(numbers.params[0]),
            long(numbers.grads[0][0]),
            *(long(numbers.states[name][0]) for name in STATES),
        ],
        golden(PERIOD, target.seed),
        [numbers.params[0]],
        f"a tensor of {n} elements",
    )
    numbers = numbers_of(SMALL, target.seed)

    def many(values: Sequence[Tensor]) -> list[Tensor]:
        narrow = [value.float().to(target.device) for value in values]
        return [narrow[index % len(narrow)].clone() for index in range(count)]

    _updated(
        target,
        [
            many(numbers.params),
            many(numbers.grads[0]),
            *(many(numbers.states[name]) for name in STATES),
        ],
        golden(SMALL, target.seed),
        numbers.params,
        f"a list of {count} tensors",
    )


def _updated(
    target: Target,
    given: Sequence[list[Tensor]],
    right: Sequence[dict[str, Golden]],
    start: Sequence[Tensor],
    what: str,
) -> None:
    """One update of params, grads, exp_avg and exp_avg_sq, whose numbers repeat as `right` does."""
    params, grads, *moments = given
    states = dict(zip(STATES, moments, strict=True))
    target.kernel(params, grads, states, step=1, hyper=PLAIN)
    for kind, results in enumerate(right):
        for name, wanted in results.items():
            tensors = (params if name == "update" else states[name])[kind :: len(right)]
            before = start[kind] if name == "update" else torch.zeros_like(start[kind])
            _repeats(torch.cat(tensors), wanted, before, f"{what}: {name}")


def _repeats(found: Tensor, wanted: Golden, before: Tensor, what: str) -> None:
    """Every element of every repetition is within the limit of an element."""
    period = len(wanted.value)
    if not period:
        return
    noise = LIMITS["element"].value * wanted.noise.clamp(min=SMALLEST[torch.float32])
    goal, noise = (before + wanted.value).to(found.device), noise.to(found.device)
    for first in range(0, len(found), AT_ONCE):
        part = found[first : first + AT_ONCE].double()
        place = torch.arange(first, first + len(part), device=part.device) % period
        off = part - goal[place]
        wrong = ~(off.abs() <= noise[place])  # NaN is wrong too
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise WrongKernelError(
                f"{what} is off by {float(off[at]):.4g} at element {first + at} of {len(found)} "
                f"in their order; of the next {len(part) - at}, {int(wrong.sum())} are wrong",
                hint="what lies beyond some number of elements, blocks or tensors is left out",
            )


def reloaded(target: Target, record: Record) -> None:
    """Other numbers are written into the same tensors, as a checkpoint is loaded: the next update
    starts from them.
    """
    case = Updates(name="reloaded", shapes=FEW, lists="kept", state=True)
    lists, _ = run(target, case, target.seed)
    numbers = numbers_of(case, target.seed + 1)
    for tensor, value in zip(lists.params, numbers.params, strict=True):
        tensor.copy_(value)
    for name, kept in lists.states.items():
        for tensor, value in zip(kept, numbers.states[name], strict=True):
            tensor.copy_(value)
    lists = replace(lists, start=numbers.params)
    run(target, case, target.seed + 1, lists=lists)
    with hinted("parameters or moments of its own, or others cached from the call before"):
        judge_lists(target, Record(), case, lists, target.seed + 1)


WARM = 300  # calls, more than what a bounded cache keeps
CALLS = 100


def leaks(target: Target, record: Record) -> None:
    """Once all caches are full, a call leaves no tensor behind."""
    case = Updates(name="leaks", shapes=((3,), (2, 2)), steps=1)
    lists, numbers = run(target, case, target.seed)
    counts = []
    for calls in (WARM, CALLS):
        for _ in range(calls):
            grads = [value.float().to(target.device) for value in numbers.grads[0]]
            target.kernel(lists.params, grads, lists.states, step=2, hyper=case.hyper)
        del grads
        counts.append(_live_tensors())
    if counts[1] - counts[0] >= CALLS:
        raise WrongKernelError(
            f"after {CALLS} calls {counts[1] - counts[0]} more tensors are alive than before",
            hint="something is kept of every call: training runs out of memory",
        )


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
