"""Which checks a backend is asked, and asking one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Collection, Iterator, Sequence

import torch

from picotron_conformance.check import (
    Check,
    Outcome,
    Profile,
    Record,
    Target,
    UndecidedError,
    Verdict,
    WrongKernelError,
)
from picotron_conformance.checks import checks_of
from picotron_conformance.watchdog import deadline
from picotron_core.hardware import Device
from picotron_core.registry.types import Candidate, Code, Reason

# A call beyond these could take the process down with it; the selection refuses it already.
NEVER_CALL = {Code.DEVICE, Code.CAPABILITY, Code.NOT_INSTALLED, Code.VERSION}


def plan(op: str, *, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    """Every check of an op, in a fixed order; `ask` settles what a backend does not claim."""
    yield from checks_of(op, device=device, profile=profile, seed=seed)


def run_checks(
    candidate: Candidate,
    *,
    device: Device,
    profile: Profile,
    seed: int,
    only: Collection[str] | None = None,
    stop_at_first: bool = False,
) -> list[Outcome]:
    """Ask one backend everything; the same as the pytest suite does, in this process.

    Args:
        only: names of families, e.g. {"forward", "gradient"}.
        stop_at_first: end at the first FAIL, ERROR or TIMEOUT.
    """
    target = target_of(candidate, device=device, profile=profile, seed=seed)
    outcomes = []
    for check in plan(candidate.backend.op, device=device, profile=profile, seed=seed):
        if only is not None and check.name not in only:
            continue
        outcomes.append(ask(target, check))
        if stop_at_first and outcomes[-1].verdict in (Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT):
            break
    return outcomes


def target_of(candidate: Candidate, *, device: Device, profile: Profile, seed: int) -> Target:
    """The loaded kernel. Raises whatever loading it raises."""
    return Target(
        candidate=candidate,
        kernel=candidate.backend.load(),
        device=torch.device(device.type),
        profile=profile,
        seed=seed,
    )


def ask(target: Target, check: Check) -> Outcome:
    """Run one check under the watchdog; whatever happens becomes its verdict."""
    record = Record()
    started = time.perf_counter()
    verdict, detail, hint = Verdict.PASS, "", ""
    try:
        with deadline(check.seconds):
            reasons = _reasons(target, check)
            if not reasons:
                check.run(target, record)
            else:
                verdict, detail = Verdict.UNSUPPORTED, "; ".join(map(str, reasons))
                if check.refused and not {reason.code for reason in reasons} & NEVER_CALL:
                    check.refused(target, record)
    except WrongKernelError as wrong:
        verdict, detail, hint = Verdict.FAIL, wrong.detail, wrong.hint
    except UndecidedError as undecided:
        verdict, detail = undecided.verdict, undecided.detail
    except TimeoutError as late:
        verdict, detail = Verdict.TIMEOUT, str(late)
    except Exception as error:  # noqa: BLE001 - a kernel may raise anything; it is the answer
        verdict, detail = Verdict.ERROR, _described(error)
    return outcome_of(
        target.candidate,
        check,
        verdict=verdict,
        detail=detail,
        hint=hint,
        record=record,
        seconds=time.perf_counter() - started,
    )


def outcome_of(
    candidate: Candidate,
    check: Check,
    *,
    verdict: Verdict,
    detail: str = "",
    hint: str = "",
    record: Record | None = None,
    seconds: float = 0.0,
) -> Outcome:
    record = record or Record()
    request = check.request
    return Outcome(
        id=f"{check.op}={candidate.qualified_name}-{check.id}",
        op=check.op,
        backend=candidate.qualified_name,
        check=check.name,
        case=check.case,
        dtype=check.dtype,
        aspect=check.aspect,
        verdict=verdict,
        detail=detail,
        hint=hint,
        sizes={} if request is None else dict(request.sizes),
        features=() if request is None else tuple(sorted(request.features)),
        measurements=tuple(record.measurements),
        notes=tuple(record.notes),
        seconds=round(seconds, 4),
    )


def _reasons(target: Target, check: Check) -> Sequence[Reason]:
    if check.request is None:
        return ()
    return tuple(target.candidate.backend.supports(check.request))


def _described(error: Exception) -> str:
    """The error, and the last line of the kernel's own that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    where = f" (at {last.filename.rsplit('/', 1)[-1]}:{last.lineno}: {last.line})" if last else ""
    return f"raised {type(error).__name__}: {str(error).strip()[:600]}{where}"
