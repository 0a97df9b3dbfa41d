"""Backends are declared here (control plane); the hot path calls what `bind` returned."""

from __future__ import annotations

from picotron_core.registry.hookspecs import hookimpl
from picotron_core.registry.types import (
    Backend,
    Candidate,
    Code,
    Kernel,
    Level,
    Provider,
    Reason,
    Request,
    Selection,
    Verdict,
    kernel_from,
    normalise,
)

__all__ = [
    "Backend",
    "Candidate",
    "Code",
    "Kernel",
    "Level",
    "Provider",
    "Reason",
    "Request",
    "Selection",
    "Verdict",
    "hookimpl",
    "kernel_from",
    "normalise",
]
