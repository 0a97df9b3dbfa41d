"""The families of checks, one file each. `checks_of` gathers all that an op is asked."""

from __future__ import annotations

from collections.abc import Iterator

from picotron_conformance.cases import DTYPES
from picotron_conformance.check import Check, Profile
from picotron_conformance.checks import values
from picotron_conformance.forms import FORMS
from picotron_core.hardware import Device

FUNCTIONAL = (values.checks,)


def checks_of(op: str, *, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    if op in FORMS:
        for dtype in DTYPES:
            for family in FUNCTIONAL:
                yield from family(op, dtype, device, profile, seed)
