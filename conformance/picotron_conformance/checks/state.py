"""Nothing is kept between calls, and nothing outside of the results is changed."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from picotron_conformance.calling import (
    Run,
    backward,
    forward,
    judge_run,
    leaves_of,
    placed_tensors,
    placed_upstream,
    run,
    same_bits,
)
from picotron_conformance.check import (
    Check,
    Profile,
    Record,
    Target,
    WrongKernelError,
    hinted,
)
from picotron_conformance.claimed import (
    Question,
    claimed,
    of_each_kind,
    question,
    smaller_and_larger,
    trained,
)
from picotron_conformance.forms import FORMS
from picotron_conformance.inputs import Placed
from picotron_conformance.problem import Case, problem_of
from picotron_conformance.surroundings import CHANGED, poisoned_memory, put_back, snapshot
from picotron_core.hardware import Device

CALLS = 30  # a kernel that is right at first, as while it is tuned or cached, must stay right
POISONED = 24  # cases; more would show the same memory again


def checks(op: str, dtype: str, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    questions: dict[str, Question] = {
        "new-content": new_content,
        "other-shapes": other_shapes,
        "kept-results": kept_results,
        "interleaved": interleaved,
        "backward-twice": backward_twice,
        "written-between": written_between,
        "repeat": repeat,
        "threads": threads,
        "globals": globals_unchanged,
        "poison": poison,
    }
    for name, ask in questions.items():
        yield question(op, name, dtype, "state", ask)


def new_content(target: Target, record: Record, op: str, dtype: str) -> None:
    """The same tensors hold other numbers, then the same in another order: results follow them.

    Written once as an optimizer does, and once past autograd's version counter, as `.data` does.
    """
    cases, training = claimed(target, op, dtype, wanted=lambda case: not case.layouts_overlap)
    form = FORMS[op]
    for number, case in enumerate(of_each_kind(cases)):
        turns = [(case, 0, True), (_reversed(case), 0, True), (case, 1, False)]
        placed: dict[str, Placed] = {}
        leaves: dict[str, Tensor] = {}
        upstream: dict[str, Placed] = {}
        for now, seed, counted in turns if number == 0 else turns[::2]:
            problem = problem_of(now, target.seed + seed)
            fresh = placed_tensors(now, problem, target.device)
            back = placed_upstream(now, problem, target.device) if training else {}
            placed = {n: _refilled(placed.get(n, v), v, counted) for n, v in fresh.items()}
            upstream = {n: _refilled(upstream.get(n, v), v, counted) for n, v in back.items()}
            leaves = leaves or (leaves_of(form, placed) if training else {})
            with torch.set_grad_enabled(training):
                outputs = forward(form, target.kernel, now, placed, leaves)
            gradients = backward(form, now, outputs, leaves, upstream) if training else {}
            found = Run(placed, {n: v.detach() for n, v in outputs.items()}, gradients)
            with hinted("a result kept by the address, the shape or the sum of its inputs"):
                judge_run(target, now, found, record, training=training, seed=target.seed + seed)


def _reversed(case: Case) -> Case:
    """The same values in reverse order, so that sums and extremes over them stay."""

    def draw(generator: Generator) -> dict[str, Tensor]:
        drawn = case.draw(generator)
        return {
            name: value.flip(tuple(range(value.dim()))) if value.is_floating_point() else value
            for name, value in drawn.items()
        }

    return replace(case, draw=draw)


def other_shapes(target: Target, record: Record, op: str, dtype: str) -> None:
    """Calls of one size, a smaller and a larger one, in turn, with other numbers each time."""
    cases, training = claimed(target, op, dtype)
    for seed in (target.seed, target.seed + 1):
        for case in smaller_and_larger(cases):
            found = run(target, case, training=training, seed=seed)
            with hinted("a buffer or result kept from a call of another shape"):
                judge_run(target, case, found, record, training=training, seed=seed)


def kept_results(target: Target, record: Record, op: str, dtype: str) -> None:
    """What the first call returned is not touched by the second."""
    cases, training = claimed(target, op, dtype)
    for case in of_each_kind(cases):
        first = run(target, case, training=training)
        before = _copied(first.results)
        run(target, case, training=training, seed=target.seed + 1)
        for name, value in before.items():
            now = first.results[name]
            if now is not None and value is not None and not same_bits(now, value):
                raise WrongKernelError(
                    f"{name} of the first call changed during the second",
                    hint="a result in a buffer that the kernel keeps and uses again",
                )


def interleaved(target: Target, record: Record, op: str, dtype: str) -> None:
    """Forward A, forward B, backward A, backward B: a pipeline with micro-batches in flight.

    Each kind of case with itself on other numbers, then all cases at once.
    """
    cases = trained(target, op, dtype)
    for case in of_each_kind(cases):
        _in_flight(target, record, [(case, target.seed), (case, target.seed + 1)])
    near = [case for case in cases if not case.is_far]
    _in_flight(target, record, [(case, target.seed) for case in near])


def _in_flight(target: Target, record: Record, calls: Sequence[tuple[Case, int]]) -> None:
    flights = []
    for case, seed in calls:
        problem = problem_of(case, seed)
        placed = placed_tensors(case, problem, target.device)
        leaves = leaves_of(FORMS[case.op], placed)
        outputs = forward(FORMS[case.op], target.kernel, case, placed, leaves)
        flights.append((case, seed, placed, leaves, outputs, problem))
    for case, seed, placed, leaves, outputs, problem in flights:
        upstream = placed_upstream(case, problem, target.device)
        gradients = backward(FORMS[case.op], case, outputs, leaves, upstream)
        found = Run(placed, {n: v.detach() for n, v in outputs.items()}, gradients)
        with hinted("what the backward needs is kept outside of the graph"):
            judge_run(target, case, found, record, training=True, seed=seed)


def backward_twice(target: Target, record: Record, op: str, dtype: str) -> None:
    """With retain_graph a second backward gives the same gradients."""
    cases, form = trained(target, op, dtype), FORMS[op]
    for case in of_each_kind(cases):
        problem = problem_of(case, target.seed)
        placed = placed_tensors(case, problem, target.device)
        upstream = placed_upstream(case, problem, target.device)
        leaves = leaves_of(form, placed)
        outputs = forward(form, target.kernel, case, placed, leaves)
        for last in (False, True):
            gradients = backward(form, case, outputs, leaves, upstream, again=not last)
            found = Run(placed, {n: v.detach() for n, v in outputs.items()}, gradients)
            with hinted("a backward that overwrites what was saved, or adds to a buffer it keeps"):
                judge_run(target, case, found, record, training=True)


def written_between(target: Target, record: Record, op: str, dtype: str) -> None:
    """An input is written to between forward and backward: that raises, or changes no gradient."""
    for case in of_each_kind(
        trained(target, op, dtype, wanted=lambda case: not case.layouts_overlap)
    ):
        for name, value in problem_of(case, target.seed).tensors.items():
            if value.is_floating_point():
                _written_between(target, record, case, name)


def _written_between(target: Target, record: Record, case: Case, name: str) -> None:
    form, problem = FORMS[case.op], problem_of(case, target.seed)
    placed = placed_tensors(case, problem, target.device)
    upstream = placed_upstream(case, problem, target.device)
    leaves = leaves_of(form, placed)
    outputs = forward(form, target.kernel, case, placed, leaves)
    results = {n: v.detach().clone() for n, v in outputs.items()}
    with torch.no_grad():
        placed[name].tensor.mul_(-3)
    try:
        gradients = backward(form, case, outputs, leaves, upstream)
    except RuntimeError:
        return
    with hinted("what the backward needs is kept by other means than save_for_backward"):
        judge_run(target, case, Run(placed, results, gradients), record, training=True)


def repeat(target: Target, record: Record, op: str, dtype: str) -> None:
    """The same call many times is right each time, and keeps no tensor of each."""
    cases, training = claimed(target, op, dtype)
    before = 0
    for number in range(CALLS):
        found = run(target, cases[0], training=training)
        with hinted("a race, or a kernel that changes after some calls"):
            judge_run(target, cases[0], found, Record(), training=training)
        if number == CALLS // 2:
            before = _living_tensors()
    kept = _living_tensors() - before
    if kept >= CALLS // 2 - 1:
        raise WrongKernelError(
            f"{kept} tensors more are alive after {CALLS - 1 - CALLS // 2} calls more",
            hint="a list or a cache that grows with every call: memory runs out in a long run",
        )


def threads(target: Target, record: Record, op: str, dtype: str) -> None:
    """The largest cases with a thread for every core; a session asks the rest with one thread."""
    cases, training = claimed(target, op, dtype)
    before = torch.get_num_threads()
    for case in sorted(cases, key=lambda case: case.elements)[-3:]:
        torch.set_num_threads(max(2, os.cpu_count() or 2))
        try:
            found = run(target, case, training=training)
        finally:
            torch.set_num_threads(before)
        with hinted("threads that write to one place, or a part of the work given to none"):
            judge_run(target, case, found, record, training=training)


def globals_unchanged(target: Target, record: Record, op: str, dtype: str) -> None:
    """Random states, flags, threads, and the functions of torch are as before.

    `ask` looks at them around every check; here the random states are such as no kernel would set.
    """
    cases, training = claimed(target, op, dtype)
    if target.changes:
        raise WrongKernelError(f"loading the kernel changed {', '.join(target.changes)}")
    outside = snapshot()
    try:
        torch.manual_seed(target.seed + 0xC0FFEE)
        random.seed(target.seed + 0xC0FFEE)
        before = snapshot()
        for case in of_each_kind(cases):
            run(target, case, training=training)
        changed = put_back(before)
    finally:
        put_back(outside)
    if changed:
        raise WrongKernelError(f"a call changed {', '.join(changed)}", hint=CHANGED)


def poison(target: Target, record: Record, op: str, dtype: str) -> None:
    """Uninitialised memory holds NaN: nothing may be read from it before it is written."""
    # What lies between far rows would have to be filled.
    cases, training = claimed(target, op, dtype, wanted=lambda case: not case.is_far)
    for case in cases[:: max(1, len(cases) // POISONED)]:
        with poisoned_memory(target.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of kernels that are not deterministic
            found = run(target, case, training=training)
        with hinted("memory that is read, or handed out, before it is written"):
            judge_run(target, case, found, record, training=training)


def _refilled(old: Placed, new: Placed, counted: bool) -> Placed:
    """The tensor of `old` with the numbers of `new`. counted: by autograd's version counter."""
    (old.tensor if counted else old.tensor.data).copy_(new.tensor)
    return Placed(old.tensor, old.buffer, old.buffer.clone(), old.tensor._version)


def _living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def _copied(results: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: None if value is None else value.clone() for n, value in results.items()}
