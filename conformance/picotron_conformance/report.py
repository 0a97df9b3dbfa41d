"""The report: every check's outcome with what is needed to see it again, as one JSON file."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from picotron_conformance.check import EXECUTED, Outcome, Verdict
from picotron_conformance.documents import FORMAT, REPORT, parse, plain, read_document
from picotron_conformance.limits import LIMITS, Limit
from picotron_conformance.session import Session
from picotron_core.files import replace_text

BROKEN = (Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report as read. `limits` are those that it was judged by, not today's."""

    session: Session
    limits: Mapping[str, Limit]
    checks: tuple[Outcome, ...]


def write_report(path: Path, session: Session, outcomes: Iterable[Outcome]) -> None:
    """One object a check, each on a line of its own; its fields are those of `Outcome`."""
    checks = with_commands(session, outcomes)
    head = {
        "kind": REPORT,
        "format": FORMAT,
        "session": plain(session),
        "summary": {key: plain(counts) for key, counts in summary(checks).items()},
        "limits": plain(LIMITS),
    }
    lines = (json.dumps({"seed": session.seed} | plain(check)) for check in checks)
    text = json.dumps(head, indent=2).removesuffix("\n}")
    replace_text(path, text + ',\n  "checks": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n")


def read_report(path: Path) -> Report:
    """Raises: ConfigError or DamagedFileError with what to do."""
    return parse(path, REPORT, read_document(path, REPORT), Report)


def with_commands(session: Session, outcomes: Iterable[Outcome]) -> tuple[Outcome, ...]:
    """The outcomes, each with the command that asks its check alone."""
    return tuple(
        check if check.reproduce else replace(check, reproduce=reproduce(check, session))
        for check in outcomes
    )


def reproduce(check: Outcome, session: Session) -> str:
    """The shell command that runs one check again as it ran."""
    return shlex.join(
        [
            *("pytest", "--pyargs", f"picotron_conformance.test_backend::test_backend[{check.id}]"),
            *("--picotron-backend", key_of(check)),
            *("--picotron-profile", session.profile),
            *("--picotron-seed", str(session.seed)),
            *("--picotron-device", session.machine.device.type),
        ]
    )


def key_of(check: Outcome) -> str:
    """The backend's name in reports and on the command line: "norm=picotron/naive-math"."""
    return f"{check.op}={check.backend}"


def by_backend(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for check in outcomes:
        found.setdefault(key_of(check), []).append(check)
    return found


def summary(outcomes: Iterable[Outcome]) -> dict[str, dict[Verdict, int]]:
    """How many checks of each backend got each verdict; all verdicts are there, in one order."""
    return {key: tally(checks) for key, checks in by_backend(outcomes).items()}


def tally(checks: Iterable[Outcome]) -> dict[Verdict, int]:
    counts = Counter(check.verdict for check in checks)
    return {verdict: counts[verdict] for verdict in Verdict}


def failure(outcomes: Sequence[Outcome], *, named: Collection[str] = ()) -> str:
    """Why this session failed, to print; empty where it passed.

    Args:
        named: the backends that were asked for by name ("norm=acme/fast"). That nothing of such a
            one was executed is a failure: a suite that asks nothing proves nothing.
    """
    counts = summary(outcomes)
    broken = [
        f"{key} ({_counted(count, BROKEN)})"
        for key, count in counts.items()
        if any(count[verdict] for verdict in BROKEN)
    ]
    sentences = [f"{len(broken)} of {len(counts)} backends failed: {', '.join(broken)}."]
    if not broken:
        sentences = []
    if not any(check.verdict in EXECUTED for check in outcomes):
        total = tally(outcomes)
        asked = _counted(total, tuple(Verdict)) or "there was none to ask"
        return f"No check was executed, and so nothing is proven: {asked}.{_first_why(outcomes)}"
    for key in named:
        count = counts.get(key, tally(()))
        if not any(count[verdict] for verdict in EXECUTED):
            its = [check for check in outcomes if key_of(check) == key]
            asked = _counted(count, tuple(Verdict)) or "there was none to ask"
            sentences.append(f"No check of {key} was executed: {asked}.{_first_why(its)}")
    return " ".join(sentences)


def _counted(counts: Mapping[Verdict, int], verdicts: Iterable[Verdict]) -> str:
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in verdicts if counts[verdict])


def _first_why(checks: Iterable[Outcome]) -> str:
    """The commonest reason, for where there are hundreds they are mostly one."""
    reasons = Counter(check.detail for check in checks if check.detail)
    return f" Mostly because: {reasons.most_common(1)[0][0]}" if reasons else ""
