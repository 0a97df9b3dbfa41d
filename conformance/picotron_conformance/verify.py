"""Whether a certificate is whole, and speaks of what is installed here."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from picotron_conformance.certificate import NOTE, Certificate, Certified, read_certificate
from picotron_conformance.check import Verdict
from picotron_conformance.session import Machine, look_at_machine
from picotron_conformance.sources import contract_files, suite_files
from picotron_core import __version__
from picotron_core.errors import PicotronError
from picotron_core.hardware import look
from picotron_core.registry.sources import digest, distribution_files

MOST_FILES = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. Any "bad" one makes the certificate void here; a "note" is for the reader."""

    kind: Literal["good", "bad", "note"]
    text: str


def verify(path: Path) -> tuple[Certificate, list[Finding]]:
    """Check the content's hash, the suite, the contracts and the files of every backend.

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
    files_of = cache(distribution_files)  # many backends share a distribution
    for backend in certificate.backends:
        findings += _backend(backend, files_of(backend.distribution, backend.package))
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


def _backend(backend: Certified, files: Mapping[str, str]) -> Iterator[Finding]:
    name = f"{backend.key}: {backend.distribution}"
    try:
        here = version(backend.distribution)
    except (PackageNotFoundError, ValueError):  # ValueError: a name that cannot be one
        yield Finding("bad", f"{name} is not installed here")
        return
    passed = f"{backend.checks.get(Verdict.PASS, 0)} checks passed, tier {backend.claims.tier}"
    if here != backend.version:
        yield Finding("bad", f"{name} {here} is installed; certified is {backend.version}")
    elif changes := _changes(backend.files, files):
        yield Finding("bad", f"{name} {here} has other files than certified: {changes}")
    else:
        yield Finding("good", f"{name} {here} has the files that were certified: {passed}")


def _changes(then: Mapping[str, str], here: Mapping[str, str]) -> str:
    changes = {path: "changed" for path in then.keys() & here.keys() if then[path] != here[path]}
    changes |= dict.fromkeys(then.keys() - here.keys(), "missing")
    changes |= dict.fromkeys(here.keys() - then.keys(), "added")
    words = [f"{path} {change}" for path, change in sorted(changes.items())]
    more = [f"{len(words) - MOST_FILES} more"] if len(words) > MOST_FILES else []
    return ", ".join(words[:MOST_FILES] + more)


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
