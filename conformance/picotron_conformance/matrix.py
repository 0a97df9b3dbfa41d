"""A report as a matrix: one grid a backend, aspects down, dtypes across. What the pages show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from picotron_conformance.check import ASPECTS, EXECUTED, Outcome, Verdict
from picotron_conformance.report import BROKEN, Report, by_backend, tally
from picotron_conformance.session import UnderTest

DTYPES = ("float64", "float32", "bfloat16", "float16")
ANY = "any"  # the column of the checks that have no dtype


@dataclass(frozen=True, slots=True)
class Cell:
    """The checks of one backend, aspect and dtype."""

    checks: tuple[Outcome, ...]

    @property
    def executed(self) -> int:
        return sum(check.verdict in EXECUTED for check in self.checks)

    @property
    def passed(self) -> int:
        return sum(check.verdict is Verdict.PASS for check in self.checks)

    @property
    def broken(self) -> int:
        return sum(check.verdict in BROKEN for check in self.checks)

    @property
    def worst(self) -> float | None:
        """The largest fraction of a limit; None where nothing was measured."""
        return worst_of(check for check in self.checks if check.verdict in EXECUTED)

    @property
    def skipped(self) -> tuple[tuple[str, int], ...]:
        """How many were not executed: (("unsupported", 4), ("not run", 1)), without zeros."""
        counts = tally(self.checks)
        words = {Verdict.UNSUPPORTED: "unsupported", Verdict.NOT_RUN: "not run"}
        return tuple((word, counts[verdict]) for verdict, word in words.items() if counts[verdict])


@dataclass(frozen=True, slots=True)
class Grid:
    """One backend. `rows`: a cell by aspect and dtype; only those that hold a check."""

    key: str  # "norm=picotron/naive-math"
    backend: UnderTest | None  # None in a report whose session does not know it
    whole: Cell
    rows: Mapping[str, Mapping[str, Cell]]

    @property
    def verdict(self) -> Verdict:
        """FAIL for any failure; NOT_RUN where nothing was executed, for that proves nothing."""
        if self.whole.broken:
            return Verdict.FAIL
        return Verdict.PASS if self.whole.executed else Verdict.NOT_RUN


@dataclass(frozen=True, slots=True)
class Skip:
    """Checks of a backend that were not executed, for one reason."""

    verdict: Verdict
    detail: str
    count: int


def grids_of(report: Report) -> list[Grid]:
    """Every backend of the session, also one that was asked nothing; in the session's order."""
    checks = by_backend(report.checks)
    known = {backend.key: backend for backend in report.session.backends}
    return [
        _grid(key, known.get(key), checks.get(key, [])) for key in dict.fromkeys([*known, *checks])
    ]


def columns_of(report: Report) -> list[str]:
    found = {check.dtype or ANY for check in report.checks}
    others = sorted(found - {*DTYPES, ANY})
    return [dtype for dtype in (*DTYPES, *others, ANY) if dtype in found]


def skips_of(checks: Iterable[Outcome]) -> list[Skip]:
    """What was not executed and why, the commonest reason first."""
    counts = Counter(
        (check.verdict, check.detail) for check in checks if check.verdict not in EXECUTED
    )
    skips = [Skip(verdict, detail, count) for (verdict, detail), count in counts.items()]
    return sorted(skips, key=lambda skip: (-skip.count, skip.verdict, skip.detail))


def worst_of(checks: Iterable[Outcome]) -> float | None:
    """The largest fraction of a limit; a NaN counts as infinite, for no limit allows it."""
    fractions = [
        math.inf if math.isnan(fraction) else fraction
        for check in checks
        for measurement in check.measurements
        for fraction in measurement.fractions.values()
    ]
    return max(fractions, default=None)


def of_limit(fraction: float) -> str:
    """A fraction of a limit for people: 73% is within it, 3.1x is beyond.

    >>> of_limit(0.734), of_limit(0.9999), of_limit(3.14), of_limit(5e7)
    ('73%', '99%', '3.1x', '5e+07x')
    """
    if fraction <= 1:
        return f"{math.floor(fraction * 100)}%"
    return "infinite" if math.isinf(fraction) else f"{fraction:.2g}x"


def headline(report: Report, grids: Sequence[Grid]) -> str:
    """One sentence that may stand alone."""
    failed = [grid.key for grid in grids if grid.verdict is Verdict.FAIL]
    empty = [grid.key for grid in grids if grid.verdict is Verdict.NOT_RUN]
    executed = sum(grid.whole.executed for grid in grids)
    if not executed:
        return "No check was executed: nothing is proven."
    if failed:
        broken = sum(grid.whole.broken for grid in grids)
        return f"{_of(len(failed), len(grids))} failed, in {broken} of {executed} executed checks."
    if unproven := [key for key in report.session.named if key in empty]:
        return f"No check of {', '.join(unproven)} was executed: nothing is proven of it."
    proven = len(grids) - len(empty)
    return f"{_of(proven, len(grids))} passed all {executed} checks that were executed."


def _of(count: int, total: int) -> str:
    if count == total <= 2:
        return ("The backend", "Both backends")[total - 1]
    return f"All {total} backends" if count == total else f"{count} of {total} backends"


def _grid(key: str, backend: UnderTest | None, checks: list[Outcome]) -> Grid:
    found: dict[str, dict[str, list[Outcome]]] = {}
    for check in checks:
        found.setdefault(check.aspect, {}).setdefault(check.dtype or ANY, []).append(check)
    aspects = [*(a for a in ASPECTS if a in found), *(a for a in found if a not in ASPECTS)]
    rows = {a: {dtype: Cell(tuple(some)) for dtype, some in found[a].items()} for a in aspects}
    return Grid(key, backend, Cell(tuple(checks)), rows)
