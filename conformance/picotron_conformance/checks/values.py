"""Is every output and every gradient right? All cases; the rest of the suite asks of state."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from picotron_conformance.calling import judge_run, run
from picotron_conformance.cases import cases_of
from picotron_conformance.check import Check, Profile, Record, Target, WrongKernelError
from picotron_conformance.problem import Case
from picotron_core.errors import PicotronError
from picotron_core.hardware import Device

# How a kernel may say no. Not AssertionError or IndexError: those are accidents.
REFUSALS = (ValueError, TypeError, RuntimeError, PicotronError)


def checks(op: str, dtype: str, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    for case in cases_of(op, dtype, profile, seed):
        for name, aspect, training in (
            ("forward", "forward", False),
            ("gradient", "gradient", True),
        ):
            yield Check(
                op=op,
                name=name,
                case=case.name,
                dtype=dtype,
                aspect=aspect,
                request=case.request(device, training=training),
                run=partial(right, case=case, training=training),
                refused=partial(refuses, case=case, training=training),
            )


def right(target: Target, record: Record, *, case: Case, training: bool) -> None:
    """Outputs without autograd, or outputs and gradients with it, within the limits."""
    found = run(target, case, training=training)
    judge_run(target, case, found, record, training=training)


def refuses(target: Target, record: Record, *, case: Case, training: bool) -> None:
    """What is not claimed raises. To be right beyond one's claims is no fault, to be wrong is."""
    try:
        found = run(target, case, training=training)
    except REFUSALS as refusal:
        record.notes.append(f"raised {type(refusal).__name__}")
        return
    try:
        judge_run(target, case, found, Record(), training=training)
    except WrongKernelError as wrong:
        raise WrongKernelError(
            f"it does not claim this, yet computes it, and wrongly: {wrong.detail}",
            hint="an argument that the kernel ignores: raise ValueError where `supports` says no",
        ) from None
    record.notes.append("right, though not claimed")
