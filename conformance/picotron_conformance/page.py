"""The report as one HTML file: nothing is loaded from elsewhere, and nothing in it is a script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import count
from math import inf, isinf, isnan
from pathlib import Path

from picotron_conformance.check import ASPECTS, EXECUTED, Measurement, Outcome, Verdict
from picotron_conformance.markdown import environment, subtitle
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

MOST_SHOWN = 20  # failures of a backend that are open at first
_CLASS = {Verdict.PASS: "pass", Verdict.FAIL: "fail", Verdict.NOT_RUN: "none"}


def as_page(report: Report) -> str:
    """The whole report. Every text is escaped, a plugin's above all."""
    grids = grids_of(report)
    columns = columns_of(report)
    sentence = headline(report, grids)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    numbers = count()
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Conformance: {escape(sentence)}</title>",
        f"<style>\n{style}</style></head><body><main>",
        _top(report, grids, sentence),
        _overview(grids),
        "<h2>Matrix</h2>",
        '<p class="dim">Each cell: passed of executed checks, and what part of a limit the worst '
        "result took. It leads to its checks.</p>",
        *(_card(grid, columns, numbers) for grid in grids),
        _failures(grids),
        _section("Claims", _claims(report.session)),
        _section("Not executed", _skips(grids)),
        _section("Environment", _table([], environment(report.session))),
        _section("Limits", _limits(report)),
        f"<footer>Picotron {escape(report.session.version)}</footer>",
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _top(report: Report, grids: Sequence[Grid], sentence: str) -> str:
    verdicts = {grid.verdict for grid in grids}
    worst = next((v for v in (Verdict.FAIL, Verdict.PASS) if v in verdicts), Verdict.NOT_RUN)
    tallies = []
    for verdict, number in tally(report.checks).items():
        kind = "zero" if not number else "bad" if verdict in BROKEN else ""
        tallies.append(f'<li class="{kind}"><b>{number}</b>{verdict}</li>')
    more = '<p><a href="#failures">What failed</a></p>' if worst is Verdict.FAIL else ""
    return (
        f'<div class="verdict {_CLASS[worst]}"><small>Picotron conformance report</small>'
        f'<h1>{escape(sentence)}</h1><p class="dim">{escape(subtitle(report.session))}</p>{more}'
        f'<ul class="tally">{"".join(tallies)}</ul></div>'
    )


def _overview(grids: Sequence[Grid]) -> str:
    if len(grids) < 2:
        return ""
    rows = []
    for grid in grids:
        worst = "" if grid.whole.worst is None else of_limit(grid.whole.worst)
        numbers = [*(number or "" for number in tally(grid.whole.checks).values()), worst]
        rows.append(
            f'<tr><td><a href="#{_anchor(grid)}">{escape(grid.key)}</a></td><td>{_overall(grid)}'
            f"</td>{''.join(f'<td class=number>{number}</td>' for number in numbers)}</tr>"
        )
    heads = "".join(f'<th class="number">{name}</th>' for name in (*Verdict, "worst"))
    return (
        '<h2>Backends</h2><div class="scroll"><table class="plain"><thead><tr><th>backend</th>'
        f"<th>verdict</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _anchor(grid: Grid) -> str:
    return escape(f"backend-{grid.key}")


def _card(grid: Grid, columns: Sequence[str], numbers: Iterable[int]) -> str:
    """One backend: its grid, and folded below it every check of every cell."""
    ids = iter(numbers)
    rows, folds = [], []
    for aspect, cells in grid.rows.items():
        row = [f'<th scope="row">{escape(aspect)}<small>{ASPECTS.get(aspect, "")}</small></th>']
        for dtype in columns:
            if dtype not in cells:
                row.append("<td></td>")
                continue
            anchor = f"cell-{next(ids)}"
            row.append(_cell(cells[dtype], anchor, f"{aspect}, {dtype}"))
            folds.append(_fold(cells[dtype], anchor, f"{aspect}, {dtype}"))
        rows.append(f"<tr>{''.join(row)}</tr>")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *columns))
    op, _, name = grid.key.partition("=")
    title = f'<h3>{escape(op)} <span class="dim">=</span> {escape(name)}</h3>'
    about = ""
    if backend := grid.backend:
        source = f"{backend.distribution} {backend.version}"
        about = f"<small>{escape(source)}, tier {escape(backend.claims.tier)}</small>"
    table = (
        f'<div class="scroll"><table class="matrix"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    drill = (
        f'<details class="drill"><summary>All {len(grid.whole.checks)} checks</summary>'
        f"{''.join(folds)}</details>"
    )
    return (
        f'<section class="card {_CLASS[grid.verdict]}" id="{_anchor(grid)}">'
        f"<header>{title}{_overall(grid)}{about}</header>"
        f"{table + drill if rows else '<p class=dim>It was asked nothing.</p>'}</section>"
    )


def _overall(grid: Grid) -> str:
    if grid.verdict is Verdict.NOT_RUN:
        return '<span class="word NOT_RUN">nothing executed</span>'
    return _word(grid.verdict)


def _cell(cell: Cell, anchor: str, name: str) -> str:
    kind = "fail" if cell.broken else "pass" if cell.executed else "none"
    lines = []
    if cell.executed:
        passed = f"{cell.passed}/{cell.executed}"
        failed = f"{cell.broken} of {cell.executed} failed"
        lines.append(f"<b>{failed if cell.broken else passed}</b>")
    if cell.worst is not None:
        width = min(100.0, 100 * cell.worst)
        if not cell.broken:
            lines.append(f'<span class="bar"><i style="width:{width:.0f}%"></i></span>')
        lines.append(f"<small>{_of(cell.worst, 'a limit')}</small>")
    for word, number in cell.skipped:
        lines.append(f"<small>{number} {word.replace('unsup', 'unsup&shy;')}</small>")
    return (
        f'<td class="{kind}"><a href="#{anchor}" title="{escape(name)}">{"".join(lines)}</a></td>'
    )


def _fold(cell: Cell, anchor: str, name: str) -> str:
    rows = [_row(check) for check in cell.checks if check.verdict in EXECUTED]
    for skip in skips_of(cell.checks):
        shown = f"{skip.count} of {_word(skip.verdict)}"
        rows.append(f'<tr><td>{shown}</td><td colspan="3">{escape(skip.detail)}</td></tr>')
    head = "<th>case</th><th>verdict</th><th>worst result</th><th>seconds</th>"
    return (
        f"<details{' open' if cell.broken else ''}><summary>{escape(name)}: "
        f"{cell.passed} of {len(cell.checks)} passed</summary>"
        f'<div class="scroll" id="{anchor}"><table class="plain"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _row(check: Outcome) -> str:
    sizes = " ".join(f"{letter}={size}" for letter, size in check.sizes.items())
    asked = ", ".join(part for part in (sizes, " ".join(check.features)) if part)
    name = check.case if check.check == check.aspect else f"{check.check} {check.case}"
    result = _result(check.measurements) + "".join(
        f"<small>{escape(n)}</small>" for n in check.notes
    )
    if check.verdict in BROKEN:
        result = f"{escape(check.detail)}<small>{escape(check.hint)}</small>{result}"
    return (
        f"<tr><td>{escape(name)}<small>{escape(asked)}</small></td>"
        f'<td>{_word(check.verdict)}</td><td>{result}</td><td class="number">'
        f"{check.seconds:.2f}</td></tr>"
    )


def _result(measurements: Sequence[Measurement]) -> str:
    """The result nearest to one of its limits, and its worst element."""
    if not measurements:
        return ""
    worst = max(measurements, key=lambda m: _worst(m.fractions)[1])
    limit, fraction = _worst(worst.fractions)
    if not limit:
        return f"{escape(worst.result)}: no element"
    element = f"at {list(worst.index)}: {worst.found:.7g}, must be {worst.wanted:.7g}"
    return (
        f"{escape(worst.result)}: {_of(fraction, f'the {escape(limit)} limit')}"
        f"<small>{escape(element)}</small>"
    )


def _worst(fractions: Mapping[str, float]) -> tuple[str, float]:
    known = {name: inf if isnan(f) else f for name, f in fractions.items()}
    return max(known.items(), key=lambda item: item[1], default=("", 0.0))


def _of(fraction: float, limit: str) -> str:
    """ "73% of a limit", "3.1x a limit"; the words are left out where the screen is narrow."""
    if isinf(fraction):
        return "beyond any limit"
    return f'{of_limit(fraction)}<span class="wide">{" of" if fraction <= 1 else ""} {limit}</span>'


def _failures(grids: Sequence[Grid]) -> str:
    parts = []
    for grid in grids:
        failures = [_failure(check) for check in grid.whole.checks if check.verdict in BROKEN]
        parts += failures[:MOST_SHOWN]
        if rest := failures[MOST_SHOWN:]:
            title = f"{len(rest)} more of {escape(grid.key)}"
            parts.append(f"<details><summary>{title}</summary>{''.join(rest)}</details>")
    return f'<h2 id="failures">Failures</h2>{"".join(parts)}' if parts else ""


def _failure(check: Outcome) -> str:
    hint = check.hint or "nothing known: run it alone, with --pdb"
    return (
        f'<article class="failure"><h3>{_word(check.verdict)} {escape(check.id)}</h3>'
        f'<p><span class="label">broke</span><span>{escape(check.detail)}</span></p>'
        f'<p><span class="label">looks like</span><span>{escape(hint)}</span></p>'
        f"<pre>{escape(check.reproduce)}</pre></article>"
    )


def _claims(session: Session) -> str:
    rows = []
    for backend in session.backends:
        claims = backend.claims
        promised = {
            "deterministic": claims.deterministic,
            f"{claims.memory} memory": claims.memory,
            "compiles": claims.compiles,
            f"launches {' or '.join(claims.launches)}": claims.launches,
            f"requires {', '.join(claims.requires)}": claims.requires,
        }
        source = f"{backend.distribution} {backend.version}"
        words = ", ".join(word for word, promise in promised.items() if promise)
        rows.append((backend.key, source, claims.tier, claims.level, words))
    return _table(["backend", "from", "tier", "level", "claims"], rows)


def _skips(grids: Sequence[Grid]) -> str:
    """Grouped by reason: there are often thousands of checks and few reasons."""
    rows = [
        (grid.key, str(skip.count), str(skip.verdict), skip.detail)
        for grid in grids
        for skip in skips_of(grid.whole.checks)
    ]
    if not rows:
        return ""
    meaning = "UNSUPPORTED: not claimed, and held to it. NOT_RUN: nothing is known."
    table = _table(["backend", "checks", "verdict", "why"], rows)
    return f'<p class="dim">{meaning}</p>{table}'


def _limits(report: Report) -> str:
    rows = [(name, f"{limit.value:g}", limit.why) for name, limit in report.limits.items()]
    meaning = "In units of a result's noise scale: how much a right kernel's roundings scatter it."
    return f'<p class="dim">{meaning}</p>{_table(["limit", "value", "why"], rows)}'


def _section(title: str, content: str) -> str:
    return f'<h2>{title}</h2><div class="scroll">{content}</div>' if content else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<table class="plain">{thead}<tbody>{body}</tbody></table>'


def _word(verdict: Verdict) -> str:
    return f'<span class="word {verdict}">{verdict}</span>'
