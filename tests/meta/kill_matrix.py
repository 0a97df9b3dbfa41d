"""Write docs/kill_matrix.md: which checks fail which mutant. Run by `make meta`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from picotron_conformance.check import Check
from picotron_mutants import MUTANTS, Mutant, backend_of
from trials import DEATHS, candidate_of, outcomes

from picotron_core.ops import OPS

PARTS = 2  # processes
PAGE = Path(__file__).parents[2] / "docs" / "kill_matrix.md"
HEAD = """\
# Kill matrix

The conformance suite is itself tested: by wrong kernels, each of which it must fail, and by right
ones that it must not accuse (`tests/meta/`). This page is made by `make meta`; it lists every
mutant, the family of checks that must kill it, and all families that do.

"""


def killers(mutant: Mutant) -> tuple[str, ...]:
    """The families that fail a mutant, each asked until it does."""
    found: dict[str, None] = {}

    def wanted(place: int, check: Check) -> bool:
        asked = check.name == mutant.killed_by if mutant.slow else True
        return asked and check.name not in found

    candidate = candidate_of(backend_of(mutant), "mutants")
    profile = "full" if mutant.slow else "quick"
    for outcome in outcomes(candidate, wanted, profile=profile):
        if outcome.verdict in DEATHS:
            found[outcome.check] = None
    return tuple(found)


def share(op: str, part: int) -> list[tuple[str, ...]]:
    """The killers of every other mutant of an op, in one process: golden results are made once."""
    mutants = [mutant for mutant in MUTANTS if mutant.op == op]
    return [killers(mutant) for mutant in mutants[part::PARTS]]


def rows() -> dict[str, list[tuple[Mutant, tuple[str, ...]]]]:
    """Every mutant with its killers, by op."""
    found: dict[str, list[tuple[Mutant, tuple[str, ...]]]] = {}
    with ProcessPoolExecutor(PARTS, mp_context=get_context("spawn")) as pool:
        shares = {op: [pool.submit(share, op, part) for part in range(PARTS)] for op in OPS}
        for op, parts in shares.items():
            mutants = [mutant for mutant in MUTANTS if mutant.op == op]
            for part, future in enumerate(parts):
                mine = zip(mutants[part::PARTS], future.result(), strict=True)
                found.setdefault(op, []).extend(mine)
            found[op].sort(key=lambda row: mutants.index(row[0]))
    return found


def section(op: str, found: Sequence[tuple[Mutant, tuple[str, ...]]]) -> str:
    lines = [f"## {op}", "", "| mutant | what it does wrong | must die of | fails too |"]
    lines.append("|---|---|---|---|")
    for mutant, names in found:
        named = mutant.killed_by if mutant.killed_by in names else f"**lives** {mutant.killed_by}"
        named += " (full profile)" if mutant.slow else ""
        others = ", ".join(sorted(name for name in names if name != mutant.killed_by))
        what = mutant.what.replace("|", "\\|")
        lines.append(f"| `{mutant.name}` | {what} | {named} | {others} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    found = rows()
    every = [row for of_op in found.values() for row in of_op]
    living = [mutant for mutant, names in every if mutant.killed_by not in names]
    once = [names for _, names in every if len(names) == 1]
    summary = [
        f"{len(every)} mutants, {len(every) - len(living)} killed by the family that must; "
        f"{len(once)} by that one alone.",
        "",
        "| op | mutants | killed |",
        "|---|---|---|",
        *(
            f"| {op} | {len(of_op)} | {sum(m.killed_by in names for m, names in of_op)} |"
            for op, of_op in found.items()
        ),
    ]
    sections = [section(op, of_op) for op, of_op in found.items()]
    PAGE.write_text(HEAD + "\n".join([*summary, "", *sections]), encoding="utf-8")
    for mutant in living:
        print(f"{mutant.op}/{mutant.name} lives: {mutant.what}", file=sys.stderr)
    return len(living) > 0


if __name__ == "__main__":
    sys.exit(main())
