"""The families of checks, one file each. `checks_of` gathers all that an op is asked."""

from __future__ import annotations

from collections.abc import Iterator

from picotron_conformance.cases import DTYPES
from picotron_conformance.check import Check, Profile
from picotron_conformance.checks import (
    claims,
    comm,
    exact,
    nonfinite,
    optimizer,
    refusals,
    special,
    state,
    values,
)
from picotron_conformance.forms import FORMS
from picotron_core.hardware import Device

FUNCTIONAL = (
    exact.checks,
    values.checks,
    state.checks,
    special.checks,
    nonfinite.checks,
    claims.checks,
)


def checks_of(op: str, *, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    yield from refusals.checks(op, device, profile, seed)
    if op == "comm":
        yield from comm.checks(device, profile, seed)
    if op == "optimizer":
        yield from optimizer.checks(device, profile, seed)
    if op in FORMS:
        for dtype in DTYPES:
            for family in FUNCTIONAL:
                yield from family(op, dtype, device, profile, seed)
