"""Asking a wrong or a right kernel what the suite asks, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

from picotron_conformance.check import Check, Outcome, Profile, Verdict
from picotron_conformance.run import ask, plan, target_of

from picotron_core.hardware import look
from picotron_core.registry.types import Backend, Candidate, Provider

DEATHS = frozenset({Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT})


def candidate_of(backend: Backend, plugin: str) -> Candidate:
    provider = Provider(plugin=plugin, distribution="picotron-meta", version="0")
    return Candidate(backend=backend, provider=provider)


def outcomes(
    candidate: Candidate,
    wanted: Callable[[int, Check], bool],
    *,
    profile: Profile = "quick",
    seed: int = 0,
) -> Iterator[Outcome]:
    """Of the checks that are wanted, by their place in the plan; asked as they are taken."""
    device = look("cpu")
    load = cache(partial(target_of, candidate, device=device, profile=profile, seed=seed))
    checks = plan(candidate.backend.op, device=device, profile=profile, seed=seed)
    for place, check in enumerate(checks):
        if wanted(place, check):
            yield ask(candidate, check, load, device=device)


def first_death(candidate: Candidate, family: str, *, profile: Profile = "quick") -> Outcome | None:
    """How a family of checks kills a kernel; None where it lives."""
    asked = outcomes(candidate, lambda _, check: check.name == family, profile=profile)
    return next((outcome for outcome in asked if outcome.verdict in DEATHS), None)


@cache
def families(op: str) -> frozenset[str]:
    return frozenset(check.name for check in plan(op, device=look("cpu"), profile="full", seed=0))
