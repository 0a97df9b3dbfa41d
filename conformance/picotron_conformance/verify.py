"""Whether a certificate is whole, and speaks of what is installed here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from picotron_conformance.certificate import NOTE, Certificate, Certified, read_certificate
from picotron_conformance.check import Verdict
from picotron_conformance.differences import Now, unclear
from picotron_conformance.session import Machine, look_at_machine
from picotron_conformance.sources import contract_files, suite_files
from picotron_core import __version__
from picotron_core.errors import PicotronError
from picotron_core.hardware import look
from picotron_core.registry.sources import digest


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. Any "bad" one makes the certificate void here; a "note" is for the reader."""

    kind: Literal["good", "bad", "note"]
    text: str


def verify(path: Path) -> tuple[Certificate, list[Finding]]:
    """Check the content's hash, the suite, the contracts, and for every backend where the registry
    finds it now, its files, and all that it rests on.

    It runs no check again: `again` is the command for that.

    Raises: ConfigError or DamagedFileError for what is no readable certificate.
    """
    certificate, sha256 = read_certificate(path)
    if certificate.sha256 != sha256:
        changed = (
            f"the content was changed since it was issued: its sha256 is {sha256[:16]}, "
            f"not {certificate.sha256[:16]} as it says"
        )
        return certificate, [Finding("bad", changed)]
    findings = [Finding("good", f"the content is as issued: sha256 {sha256[:16]}")]
    findings += _suite(certificate)
    now = Now()
    for backend in certificate.backends:
        findings += _backend(backend, now.differences(backend))
    findings += [Finding("note", text) for text in _elsewhere(certificate.machine)]
    return certificate, [*findings, Finding("note", NOTE)]


def is_valid(findings: Sequence[Finding]) -> bool:
    return all(finding.kind != "bad" for finding in findings)


def again(certificate: Certificate, *, seed: int) -> str:
    """The command that proves it anew, with inputs that nobody has seen before."""
    keys = [backend.key for backend in certificate.backends]
    return shlex.join(
        [
            *("pytest", "--pyargs", "picotron_conformance"),
            *(word for key in keys for word in ("--picotron-backend", key)),
            *("--picotron-profile", certificate.profile),
            *("--picotron-seed", str(seed)),
            *("--picotron-device", certificate.machine.device.type),
        ]
    )


def _suite(certificate: Certificate) -> Iterator[Finding]:
    here = {"suite": digest(suite_files()), "contracts": digest(contract_files())}
    then = {"suite": certificate.suite_sha256, "contracts": certificate.contracts_sha256}
    for name, sha256 in here.items():
        if then[name] == sha256:
            yield Finding("good", f"the same {name} as here: sha256 {sha256[:16]}")
        else:
            yield Finding(
                "bad",
                f"issued with other {name}: sha256 {then[name][:16]} of picotron "
                f"{certificate.version}, here {sha256[:16]} of {__version__}",
            )


def _backend(backend: Certified, differences: Iterable[str]) -> Iterator[Finding]:
    found = [Finding("bad", f"{backend.key}: {line}") for line in differences]
    found += [Finding("bad", f"{backend.key}: {line}") for line in unclear(backend)]
    if found:
        yield from found
        return
    passed = f"{backend.checks.get(Verdict.PASS, 0)} checks passed, tier {backend.claims.tier}"
    others = [f"{other.name} {other.version}".rstrip() for other in backend.rests_on]
    on = f", and so have {', '.join(dict.fromkeys(others))}" if others else ""
    yield Finding(
        "good",
        f"{backend.key}: {backend.distribution} {backend.version} has the files that were "
        f"certified{on}: {passed}",
    )


def _elsewhere(machine: Machine) -> Iterator[str]:
    """What is otherwise here: no fault, but nothing is proven of it."""
    try:
        here = look_at_machine(look(machine.device.type))
    except PicotronError:
        yield f"certified on {machine.device}; there is no such device here"
        return
    for name, then, now in (
        ("device", str(machine.device), str(here.device)),
        ("CPU", f"{machine.cpu} {machine.cpu_features}", f"{here.cpu} {here.cpu_features}"),
        ("torch", machine.torch, here.torch),
        ("CUDA", machine.cuda, here.cuda),
        ("Python", machine.python, here.python),
    ):
        if then != now:
            yield f"certified with {name} {then or 'none'}; here it is {now or 'none'}"
