"""The certificate: what a full, unfiltered session proved of backends, as one hashed JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picotron_conformance.check import EXECUTED, Outcome, Verdict
from picotron_conformance.differences import unclear
from picotron_conformance.documents import CERTIFICATE, FORMAT, parse, plain, read_document
from picotron_conformance.installed import Origin
from picotron_conformance.matrix import DTYPES, Skip, skips_of
from picotron_conformance.report import BROKEN, by_backend, tally
from picotron_conformance.session import Claims, Machine, Session, UnderTest
from picotron_core.errors import ConfigError
from picotron_core.files import replace_text
from picotron_core.registry.sources import ENTRY_POINTS

NOTE = (
    "The hash detects a change of this file by accident, not by intent: it is no signature, and "
    "anyone can make one. It speaks of files that were installed and imported: not of what a "
    "kernel opens, builds, downloads or finds in a cache of its own, nor of what a start-up file, "
    "a variable or a conftest.py changes in the process; and a kernel that knows that it is "
    "watched can behave. Who wants proof reads it and runs the suite again, with a fresh seed."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified(Origin):
    """What was proven of one backend, and of what exactly.

    checks: how many by verdict. passed: by aspect, then dtype ("any" where a check has none).
    worst: by limit, the largest fraction of it that a result took.
    checks_sha256: over the id and verdict of every check, for comparing two sessions of one seed.
    """

    claims: Claims
    checks: Mapping[Verdict, int]
    passed: Mapping[str, Mapping[str, int]]
    worst: Mapping[str, float]
    skips: tuple[Skip, ...]
    not_tested: tuple[str, ...]
    checks_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A certificate as read; see `Session` for the fields they share. `sha256`: of all others."""

    note: str
    version: str
    suite_sha256: str
    contracts_sha256: str
    profile: str
    seed: int
    issued: str  # when its session started
    machine: Machine
    backends: tuple[Certified, ...]
    sha256: str


def issue(session: Session, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The certificate of a session; the same session and outcomes give the same bytes.

    Raises: ConfigError with the first reason why there can be none.
    """
    checks = by_backend(outcomes)
    if reason := _against(session, checks):
        raise ConfigError(f"No certificate: {reason}")
    content = {
        "kind": CERTIFICATE,
        "format": FORMAT,
        "note": NOTE,
        "version": session.version,
        "suite_sha256": session.suite_sha256,
        "contracts_sha256": session.contracts_sha256,
        "profile": session.profile,
        "seed": session.seed,
        "issued": session.started,
        "machine": plain(session.machine),
        "backends": [
            plain(_certified(backend, checks[backend.key], session)) for backend in session.backends
        ],
    }
    return content | {"sha256": content_sha256(content)}


def write_certificate(path: Path, session: Session, outcomes: Sequence[Outcome]) -> None:
    """Raises: ConfigError with the first reason why there can be none; nothing is written then."""
    replace_text(path, json.dumps(issue(session, outcomes), indent=2) + "\n")


def read_certificate(path: Path) -> tuple[Certificate, str]:
    """A certificate and the sha256 that its content really has."""
    document = read_document(path, CERTIFICATE)
    certificate = parse(path, CERTIFICATE, document, Certificate)
    return certificate, content_sha256(document)


def content_sha256(document: Mapping[str, Any]) -> str:
    """Of everything but the hash itself, whatever the order of keys and the white space."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _against(session: Session, checks: Mapping[str, Sequence[Outcome]]) -> str:
    """Why these are no grounds for a certificate; empty where they are."""
    if session.profile != "full":
        return (
            f"it takes the profile 'full', this was {session.profile!r}. "
            "Run with --picotron-profile full."
        )
    if not session.complete:
        return (
            "some planned checks were deselected or not collected. Run all of them, without -k, "
            "-m, --deselect, -x or single test ids."
        )
    if session.objections:
        return session.objections[0]
    if session.machine.device.simulated:
        return f"{session.machine.device} is a profile of a card, not a card. Run on a real one."
    if not session.backends:
        return "no backend was tested. Name one with --picotron-backend OP=NAME."
    known = {backend.key for backend in session.backends}
    if stray := [key for key in checks if key not in known]:
        return f"there are checks of {stray[0]}, which the session does not know."
    for backend in session.backends:
        its = checks.get(backend.key, ())
        counts = tally(its)
        if missed := [v for v in (*BROKEN, Verdict.NOT_RUN) if counts[v]]:
            first = next(check for check in its if check.verdict is missed[0])
            return (
                f"{counts[missed[0]]} of the {len(its)} checks of {backend.key} ended {missed[0]}, "
                f"the first: {first.id}. {' '.join(first.detail.split())}".strip()
            )
        if not counts[Verdict.PASS]:
            return f"no check of {backend.key} was executed on {session.machine.device}."
        if len({check.id for check in its}) < len(its):
            return f"two checks of {backend.key} have one id, so that one of them is not proven."
        if not backend.files.keys() - {ENTRY_POINTS}:
            return (
                f"no file of {backend.key} was found: neither a distribution "
                f"{backend.distribution!r} nor a package {backend.package!r} is installed."
            )
        for why in unclear(backend):
            return f"{backend.key}: {why}."
    return ""


def _certified(backend: UnderTest, checks: Sequence[Outcome], session: Session) -> Certified:
    passed: dict[str, dict[str, int]] = {}
    worst: dict[str, float] = {}
    for check in checks:
        if check.verdict is not Verdict.PASS:
            continue
        row = passed.setdefault(check.aspect, {})
        row[check.dtype or "any"] = row.get(check.dtype or "any", 0) + 1
        for measurement in check.measurements:
            for limit, fraction in measurement.fractions.items():
                worst[limit] = max(worst.get(limit, 0.0), fraction)
    lines = "".join(f"{check.id} {check.verdict}\n" for check in sorted(checks, key=lambda c: c.id))
    return Certified(
        op=backend.op,
        name=backend.name,
        distribution=backend.distribution,
        version=backend.version,
        package=backend.package,
        files=dict(sorted(backend.files.items())),
        entry_point=backend.entry_point,
        rests_on=backend.rests_on,
        claims=backend.claims,
        checks=tally(checks),
        passed=passed,
        worst=dict(sorted(worst.items())),
        skips=tuple(skips_of(checks)),
        not_tested=_not_tested(checks, session),
        checks_sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def _not_tested(checks: Sequence[Outcome], session: Session) -> tuple[str, ...]:
    """What a reader could take for proven and is not."""
    executed = {check.dtype for check in checks if check.verdict in EXECUTED}
    silent = [dtype for dtype in DTYPES if dtype not in executed]
    skipped = sum(check.verdict is Verdict.UNSUPPORTED for check in checks)
    statements = [
        f"any device but {session.machine.device}",
        f"any torch but {session.machine.torch}",
        f"dtypes: {', '.join(silent)}" if silent else "",
        f"the {skipped} checks under skips, which it does not claim" if skipped else "",
        "inputs that no check of this seed drew",
        "speed",
    ]
    return tuple(statement for statement in statements if statement)
