"""Questions that are not about one case: they pick theirs from what the backend claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from picotron_conformance.cases import cases_of
from picotron_conformance.check import Check, Record, Target, UndecidedError, Verdict
from picotron_conformance.problem import Case

Question = Callable[[Target, Record, str, str], None]  # the last two: op and dtype


def question(op: str, name: str, dtype: str, aspect: str, ask: Question) -> Check:
    def run(target: Target, record: Record) -> None:
        ask(target, record, op, dtype)

    return Check(op=op, name=name, case="", dtype=dtype, aspect=aspect, run=run)


def claimed(
    target: Target, op: str, dtype: str, *, wanted: Callable[[Case], bool] = lambda case: True
) -> tuple[list[Case], bool]:
    """(the quick cases that it claims, whether with a backward).

    Raises: UndecidedError where it claims none.
    """
    for training in (True, False):
        cases = [case for case in _cases(target, op, dtype, training) if wanted(case)]
        if cases:
            return cases, training
    raise UndecidedError(Verdict.UNSUPPORTED, f"it claims no such case of {op} in {dtype}")


def trained(
    target: Target, op: str, dtype: str, *, wanted: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """The quick cases that it claims with a backward.

    Raises: UndecidedError where it claims none.
    """
    cases, training = claimed(target, op, dtype, wanted=wanted)
    if not training:
        raise UndecidedError(Verdict.UNSUPPORTED, "it claims no training")
    return cases


def of_each_kind(cases: Sequence[Case]) -> list[Case]:
    """The first case of each set of features: each may take another way through a kernel."""
    return list({(case.features, case.kind): case for case in reversed(cases)}.values())[::-1]


def smaller_and_larger(cases: Sequence[Case]) -> list[Case]:
    """The first case, then cases of other sizes with less and with more to do, where there are.

    Raises: UndecidedError where all are of one size.
    """
    first = cases[0]
    others = [case for case in cases if case.sizes != first.sizes and case.elements > 0]
    smaller = [case for case in others if case.elements < first.elements]
    larger = [case for case in others if case.elements > first.elements]
    if not others:
        raise UndecidedError(Verdict.UNSUPPORTED, "it claims a single size")
    return [first, *smaller[:1], *larger[:1]]


def _cases(target: Target, op: str, dtype: str, training: bool) -> Iterator[Case]:
    for case in cases_of(op, dtype, "quick", target.seed):
        request = case.request(target.hardware, training=training)
        if not target.candidate.backend.supports(request):
            yield case
