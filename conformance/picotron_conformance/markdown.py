"""The report as Markdown: for a terminal, a pull request, a step summary of CI."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from picotron_conformance.check import Outcome, Verdict
from picotron_conformance.matrix import (
    Cell,
    Grid,
    columns_of,
    grids_of,
    headline,
    of_limit,
    skips_of,
)
from picotron_conformance.report import BROKEN, Report, tally
from picotron_conformance.session import Session

MOST_FAILURES = 20  # of a backend; the JSON has them all, and CI bounds a summary's size
MOST_REASONS = 12
_WORDS = {Verdict.PASS: "pass", Verdict.FAIL: "**FAIL**", Verdict.NOT_RUN: "nothing executed"}


def as_markdown(report: Report) -> str:
    """The whole report. Text that a plugin wrote stands in code spans, where nothing is markup."""
    grids = grids_of(report)
    parts = [
        "# Conformance report",
        f"**{headline(report, grids)}**",
        subtitle(report.session),
        _summary(grids),
        "## Matrix",
        "Each cell: passed / executed checks, and what part of a limit the worst result took.",
        _matrix(grids, columns_of(report)),
        *_failures(grids),
        "## Claims",
        _claims(report.session),
        *_skips(grids),
        "## Environment",
        _table(
            ["what", "value"], [[name, code(value)] for name, value in environment(report.session)]
        ),
        "## Limits",
        "In units of a result's noise scale: how much a right kernel's roundings scatter it.",
        _table(
            ["limit", "value", "why"],
            [[name, f"{limit.value:g}", limit.why] for name, limit in report.limits.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def subtitle(session: Session) -> str:
    whole = "" if session.complete else " Not all planned checks were asked."
    return (
        f"Profile {session.profile}, seed {session.seed}, on {session.machine.device}, "
        f"torch {session.machine.torch}, {session.started}.{whole}"
    )


def environment(session: Session) -> list[tuple[str, str]]:
    """The rows of the environment: what it was called, what it was."""
    machine, device = session.machine, session.machine.device
    memory = f", {device.memory_bytes / 2**30:.1f} GiB" if device.memory_bytes else ""
    rows = [
        ("device", f"{device}{memory}"),
        ("CPU", f"{machine.cpu}, {machine.cpus} cores, {machine.cpu_features}"),
        ("platform", machine.platform),
        ("Python", machine.python),
        ("torch", machine.torch),
        ("CUDA", machine.cuda),
        ("cuDNN", machine.cudnn),
        ("driver", machine.driver),
        ("settings", ", ".join(f"{name}={value}" for name, value in machine.flags.items())),
        ("picotron", f"{session.version}, suite sha256 {session.suite_sha256[:16]}"),
        ("contracts", f"sha256 {session.contracts_sha256[:16]}"),
        ("command", " ".join(session.command)),
    ]
    return [row for row in rows if row[1]]


def _summary(grids: Sequence[Grid]) -> str:
    rows = []
    for grid in grids:
        counts = tally(grid.whole.checks)
        worst = grid.whole.worst
        rows.append(
            [
                code(grid.key),
                _WORDS[grid.verdict],
                *(str(counts[verdict] or "") for verdict in Verdict),
                "" if worst is None else of_limit(worst),
            ]
        )
    return _table(["backend", "verdict", *Verdict, "worst"], rows)


def _matrix(grids: Sequence[Grid], columns: Sequence[str]) -> str:
    rows = []
    for grid in grids:
        shown = code(grid.key)
        if not grid.rows:
            rows.append([shown, "asked nothing", *("" for _ in columns)])
        for aspect, cells in grid.rows.items():
            row = [_cell(cells[dtype]) if dtype in cells else "" for dtype in columns]
            rows.append([shown, aspect, *row])
            shown = ""
    return _table(["backend", "aspect", *columns], rows)


def _cell(cell: Cell) -> str:
    skipped = ", ".join(f"{count} {word}" for word, count in cell.skipped)
    if not cell.executed:
        return f"({skipped})"
    worst = "" if cell.worst is None else f" {of_limit(cell.worst)}"
    shown = f"{cell.passed}/{cell.executed}{worst}"
    if cell.broken:
        shown = f"**{cell.broken} of {cell.executed} FAILED**{worst}"
    return f"{shown} ({skipped})" if skipped else shown


def _failures(grids: Sequence[Grid]) -> Iterator[str]:
    broken = {g.key: [c for c in g.whole.checks if c.verdict in BROKEN] for g in grids}
    if any(broken.values()):
        yield "## Failures"
    for key, checks in broken.items():
        for check in checks[:MOST_FAILURES]:
            yield f"{check.verdict} {code(check.id)}\n\n{fenced(failure_lines(check))}"
        if len(checks) > MOST_FAILURES:
            yield f"And {len(checks) - MOST_FAILURES} more of {code(key)}: see the JSON."


def failure_lines(check: Outcome) -> list[str]:
    """Three lines: what broke, which bug looks like that, and how to see it again."""
    return [
        f"broke:      {one_line(check.detail) or 'no detail'}",
        f"looks like: {one_line(check.hint) or 'nothing known: run it alone, with --pdb'}",
        f"again:      {one_line(check.reproduce)}",
    ]


def _claims(session: Session) -> str:
    rows = []
    for backend in session.backends:
        claims = backend.claims
        also = [
            "deterministic" if claims.deterministic else "",
            f"{claims.memory} memory" if claims.memory else "",
            "compiles" if claims.compiles else "",
            f"launches {' or '.join(claims.launches)}" if claims.launches else "",
            f"requires {', '.join(claims.requires)}" if claims.requires else "",
        ]
        provider = f"{backend.distribution} {backend.version}"
        rows.append(
            [
                code(backend.key),
                code(provider),
                code(claims.tier),
                claims.level,
                code(", ".join(claim for claim in also if claim)),
            ]
        )
    return _table(["backend", "from", "tier", "level", "claims"], rows)


def _skips(grids: Sequence[Grid]) -> Iterator[str]:
    rows = []
    for grid in grids:
        shown = code(grid.key)
        skips = skips_of(grid.whole.checks)
        for skip in skips[:MOST_REASONS]:
            rows.append([shown, str(skip.count), str(skip.verdict), code(skip.detail)])
            shown = ""
        if rest := skips[MOST_REASONS:]:
            count = sum(skip.count for skip in rest)
            rows.append(["", str(count), "", f"{len(rest)} more reasons: see the JSON"])
    if rows:
        yield "## Not executed"
        yield "UNSUPPORTED: not claimed, and held to it. NOT_RUN: nothing is known."
        yield _table(["backend", "checks", "verdict", "why"], rows)


def one_line(text: str) -> str:
    """Without line ends, and without what could command a terminal: plugins wrote some of it."""
    text = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def code(text: str) -> str:
    """A code span that holds any text, in a table too."""
    text = one_line(text).replace("|", "\\|")
    if not text:
        return ""
    runs = {len(run) for run in re.findall("`+", text)}
    fence = "`" * next(n for n in range(1, len(text) + 2) if n not in runs)
    inner = f" {text} " if text[0] == "`" or text[-1] == "`" else text
    return f"{fence}{inner}{fence}"


def fenced(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded, so that it reads as a table before it is rendered; not the last column, of texts."""
    cells = [list(map(str, head)), *(list(map(one_line, row)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    widths[-1] = len(head[-1])
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
