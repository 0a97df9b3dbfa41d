"""Which checks a backend is asked, and asking one."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache, partial

import torch

from picotron_conformance.cases import PLAIN_SIZES
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
from picotron_conformance.surroundings import CHANGED, put_back, snapshot
from picotron_conformance.watchdog import deadline
from picotron_core.hardware import Device
from picotron_core.registry.select import installed_version, judge
from picotron_core.registry.types import Candidate, Code, Reason, Request

# A call beyond these could take the process down with it; the selection refuses it already.
NEVER_CALL = {Code.DEVICE, Code.CAPABILITY, Code.NOT_INSTALLED, Code.VERSION}
NOT_HERE = {Code.DEVICE, Code.NOT_INSTALLED, Code.VERSION}  # another machine would ask


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
    load = cache(partial(target_of, candidate, device=device, profile=profile, seed=seed))
    outcomes = []
    for check in plan(candidate.backend.op, device=device, profile=profile, seed=seed):
        if only is not None and check.name not in only:
            continue
        outcomes.append(ask(candidate, check, load, device=device))
        if stop_at_first and outcomes[-1].verdict in (Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT):
            break
    return outcomes


def target_of(candidate: Candidate, *, device: Device, profile: Profile, seed: int) -> Target:
    """The loaded kernel. Raises whatever loading it raises."""
    before = snapshot()
    kernel = candidate.backend.load()
    return Target(
        candidate=candidate,
        kernel=kernel,
        hardware=device,
        device=torch.device(device.type),
        profile=profile,
        seed=seed,
        changes=tuple(put_back(before)),
    )


def ask(
    candidate: Candidate,
    check: Check,
    load: Callable[[], Target],
    *,
    device: Device,
    hung: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Run one check under the watchdog; whatever happens becomes its verdict.

    Args:
        load: the target, made when it is first asked for.
        hung: called, from another thread, when the check cannot even be interrupted.
    """
    record = Record()
    started = time.perf_counter()

    def outcome(verdict: Verdict, detail: str = "", hint: str = "") -> Outcome:
        took = time.perf_counter() - started
        return outcome_of(
            candidate, check, verdict, detail=detail, hint=hint, record=record, seconds=took
        )

    def give_up() -> None:
        if hung is not None:
            hung(outcome(Verdict.TIMEOUT, f"hangs in native code for {check.seconds:g} s and more"))

    try:
        with deadline(check.seconds, give_up), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel's warnings are for its users
            reasons = _missing(candidate) or _reasons(candidate, check, device)
            if not reasons:
                target = load()
                before = snapshot()
                try:
                    check.run(target, record)
                finally:
                    changed = put_back(before)
                if changed:
                    raise WrongKernelError(f"a call changed {', '.join(changed)}", hint=CHANGED)
                return outcome(Verdict.PASS)
            codes = {reason.code for reason in reasons}
            if check.refused and not codes & NEVER_CALL:
                check.refused(load(), record)
            verdict = Verdict.NOT_RUN if codes & NOT_HERE else Verdict.UNSUPPORTED
            return outcome(verdict, "; ".join(map(str, reasons)))
    except WrongKernelError as wrong:
        return outcome(Verdict.FAIL, wrong.detail, wrong.hint)
    except UndecidedError as undecided:
        return outcome(undecided.verdict, undecided.detail)
    except TimeoutError as late:
        return outcome(Verdict.TIMEOUT, str(late))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a kernel may raise anything
        return outcome(Verdict.ERROR, _described(error))


def outcome_of(
    candidate: Candidate,
    check: Check,
    verdict: Verdict,
    *,
    detail: str = "",
    hint: str = "",
    record: Record | None = None,
    seconds: float = 0.0,
) -> Outcome:
    record = record or Record()
    request = check.request
    return Outcome(
        id=check_id(candidate, check),
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


def check_id(candidate: Candidate, check: Check) -> str:
    return f"{check.op}={candidate.qualified_name}-{check.id}"


def _missing(candidate: Candidate) -> Sequence[Reason]:
    """Distributions that it requires and that are not here."""
    reasons = judge(candidate, (), installed_version).reasons
    return [reason for reason in reasons if reason.code in NOT_HERE]


def _reasons(candidate: Candidate, check: Check, device: Device) -> Sequence[Reason]:
    supports = candidate.backend.supports
    if check.request is not None:
        return tuple(supports(check.request))
    # It finds out itself what is claimed; but without the device there is nothing to ask.
    sizes = PLAIN_SIZES[check.op]
    request = Request(op=check.op, device=device, dtype=check.dtype or "float32", sizes=sizes)
    return [reason for reason in supports(request) if reason.code in NOT_HERE]


def _described(error: BaseException) -> str:
    """The error, and the last line of the kernel's own that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    where = f" (at {last.filename.rsplit('/', 1)[-1]}:{last.lineno}: {last.line})" if last else ""
    return f"raised {type(error).__name__}: {str(error).strip()[:600]}{where}"
