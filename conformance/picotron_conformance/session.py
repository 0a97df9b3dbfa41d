"""What a session was: which suite, on which machine, against which files and claims."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from picotron_conformance.check import Profile
from picotron_conformance.installed import Installed, Origin, required
from picotron_conformance.sources import contract_files, suite_files
from picotron_core import __version__
from picotron_core.hardware import Device
from picotron_core.registry.sources import digest, distribution_files, package_of, points_of
from picotron_core.registry.types import Candidate, Level

# Variables that change what kernels compute or which of them run.
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a declaration promises; see `picotron_core.registry.Backend`."""

    level: str  # "portable", or "by request"
    tier: str
    deterministic: bool
    memory: str
    compiles: bool
    launches: tuple[str, ...]
    requires: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderTest(Origin):
    """One backend under test, and what it came from."""

    claims: Claims


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it ran. Empty text where the machine does not say."""

    device: Device
    cpu: str
    cpu_features: str  # the instructions that torch's kernels use: "AVX512"
    cpus: int
    platform: str
    python: str
    torch: str
    cuda: str  # what torch was built for: "12.6", or "rocm 6.2"
    cudnn: str
    driver: str
    flags: Mapping[str, str]  # settings of torch, and variables, that kernels obey


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """All that a report says beyond its checks. Gathered before the first check runs.

    version: of picotron, and so of the suite, which comes with it. The hashes tell two states of
        one version apart: `suite_sha256` of the checks, `contracts_sha256` of what they check.
    complete: every planned check was asked; nothing was deselected.
    named: the backends that were asked for by name ("norm=acme/fast"), rather than found.
    objections: why it may earn no certificate, whatever its checks say.
    """

    version: str
    suite_sha256: str
    contracts_sha256: str
    profile: Profile
    seed: int
    complete: bool
    named: tuple[str, ...]
    started: str  # ISO 8601, UTC
    command: tuple[str, ...]
    machine: Machine
    backends: tuple[UnderTest, ...]
    objections: tuple[str, ...] = ()


def gather_session(
    candidates: Iterable[Candidate],
    *,
    device: Device,
    profile: Profile,
    seed: int,
    command: Iterable[str] = (),
    complete: bool = False,
    named: Iterable[str] = (),
    started: datetime | None = None,
) -> Session:
    """Look at the machine and hash the files: call it before the first check, for kernels may
    change both. `dataclasses.replace(session, complete=True)` once it is known."""
    started = (started or datetime.now(UTC)).astimezone(UTC)
    files_of = cache(distribution_files)  # many backends share a distribution
    return Session(
        version=__version__,
        suite_sha256=digest(suite_files()),
        contracts_sha256=digest(contract_files()),
        profile=profile,
        seed=seed,
        complete=complete,
        named=tuple(named),
        started=started.isoformat(timespec="seconds"),
        command=tuple(command),
        machine=look_at_machine(device),
        backends=tuple(_under_test(candidate, files_of) for candidate in candidates),
    )


def look_at_machine(device: Device) -> Machine:
    import torch

    on_gpu = device.type != "cpu"
    return Machine(
        device=device,
        cpu=_cpu_name(),
        cpu_features=torch.backends.cpu.get_cpu_capability(),
        cpus=os.cpu_count() or 0,
        platform=platform.platform(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        torch=torch.__version__,
        cuda=_built_for(torch),
        cudnn=_cudnn(torch) if on_gpu else "",
        driver=_driver() if on_gpu else "",
        flags={
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
            "threads": str(torch.get_num_threads()),
            **{name: os.environ[name] for name in VARIABLES if name in os.environ},
        },
    )


def _under_test(
    candidate: Candidate, files_of: Callable[[str, str], Mapping[str, str]]
) -> UnderTest:
    backend, provider = candidate.backend, candidate.provider
    package = package_of(candidate)
    return UnderTest(
        op=backend.op,
        name=candidate.qualified_name,
        distribution=provider.distribution,
        version=provider.version,
        package=package,
        files=files_of(provider.distribution, package),
        entry_point=_entry_point(candidate),
        rests_on=required(backend.requires),
        claims=Claims(
            level=backend.level.name.lower() if isinstance(backend.level, Level) else "by request",
            tier=backend.tier,
            deterministic=backend.deterministic,
            memory=backend.memory,
            compiles=backend.compiles,
            launches=backend.launches,
            requires=backend.requires,
        ),
    )


def _entry_point(candidate: Candidate) -> str:
    """As the registry read it; empty for bundled backends."""
    points = [] if candidate.provider.bundled else points_of(candidate.provider.plugin)
    return points[0].value if points else ""


def rest_on(session: Session, found: Mapping[str, Iterable[Installed]]) -> Session:
    """The session with what else each backend turned out to rest on, by its key."""
    backends = (_resting(backend, found.get(backend.key, ())) for backend in session.backends)
    return replace(session, backends=tuple(backends))


def _resting(backend: UnderTest, found: Iterable[Installed]) -> UnderTest:
    """Without what is told already: modules of its own distribution, and one seen by two workers.

    Two that differ both stay. Then no certificate holds, for files changed while they were asked.
    """
    more = [
        installed
        for installed in found
        if installed not in backend.rests_on
        and not (installed.files and installed.files.items() <= backend.files.items())
    ]
    unique = [installed for n, installed in enumerate(more) if installed not in more[:n]]
    order = sorted(unique, key=lambda installed: (installed.distribution, installed.package))
    return replace(backend, rests_on=(*backend.rests_on, *order))


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for line in lines.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _built_for(torch: Any) -> str:
    hip = torch.version.hip
    return f"rocm {hip}" if hip else str(torch.version.cuda or "")


def _cudnn(torch: Any) -> str:
    return str(torch.backends.cudnn.version() or "")


def _driver() -> str:
    """NVIDIA's kernel module says its version in a file; elsewhere it stays unknown."""
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return next((word for word in words if word[0].isdigit() and "." in word), "")
