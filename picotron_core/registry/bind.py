"""From selections to bound kernels: load the chosen, try them, fall back only here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from picotron_core.errors import BackendError
from picotron_core.hardware import Device
from picotron_core.ops import Ops
from picotron_core.registry.plugins import Registry, notify
from picotron_core.registry.probe import probe, reference_for
from picotron_core.registry.quarantine import Quarantine, is_foreign
from picotron_core.registry.types import (
    Candidate,
    Code,
    Kernel,
    Level,
    Reason,
    Request,
    Selection,
    Verdict,
)

log = logging.getLogger("picotron")


def bind(
    selections: Mapping[str, Selection],
    registry: Registry,
    *,
    quarantine: Quarantine | None = None,
    real: Device | None = None,
) -> tuple[Ops, tuple[Selection, ...]]:
    """Load and try each selection's kernel, in its order, and freeze the winners.

    Args:
        quarantine: where plugins' kernels are tried; without one it is in this process.
        real: the device to try on, where that of the requests is simulated.

    Returns: the bound kernels (an op that nobody requested is a kernel that says so when called),
        and the selections as they came to be, with whatever failed here among the refused.
    Raises: BackendError with every reason, where no kernel of an op's selection is left.
    """
    kernels: dict[str, Kernel] = {}
    final = []
    if quarantine:
        quarantine.kernels([(s.chosen, tried_on(s.requests, real)) for s in selections.values()])
    for op, selection in selections.items():
        requests = tried_on(selection.requests, real)
        kernels[op], settled = _first_that_works(selection, requests, registry, quarantine)
        final.append(settled)
        notify(registry, "picotron_on_selection", selection=settled)
    missing = {op: _not_requested(op) for op in Ops.__slots__ if op not in kernels}
    return Ops(**kernels, **missing), tuple(final)


def tried_on(requests: Iterable[Request], real: Device | None) -> tuple[Request, ...]:
    """The requests as a trial asks them: of a device that is there."""
    return tuple(
        replace(r, device=real) if real is not None and r.device.simulated else r for r in requests
    )


def _first_that_works(
    selection: Selection,
    requests: tuple[Request, ...],
    registry: Registry,
    quarantine: Quarantine | None,
) -> tuple[Kernel, Selection]:
    refused = list(selection.refused)
    queue = [selection.chosen, *selection.runners_up]
    for number, candidate in enumerate(queue):
        kernel, reason = _load_and_try(candidate, requests, registry, quarantine)
        if quarantine:
            reason = _of_all_ranks(reason, candidate, selection.op, quarantine)
        if reason is None:
            settled = replace(
                selection,
                chosen=candidate,
                runners_up=tuple(queue[number + 1 :]),
                refused=tuple(refused),
            )
            return kernel, settled
        log.warning("%s: %s is not used: %s", selection.op, candidate.qualified_name, reason)
        refused.append(Verdict(candidate=candidate, level=Level.REFERENCE, reasons=(reason,)))
    why = "; ".join(
        f"{verdict.candidate.qualified_name}: {', '.join(map(str, verdict.reasons))}"
        for verdict in refused
    )
    raise BackendError(
        f"Op {selection.op!r}: no backend of {', '.join(selection.asked)} works here: {why}. "
        f"Take another with --backends {selection.op}=auto."
    )


def _of_all_ranks(
    mine: Reason | None, candidate: Candidate, op: str, quarantine: Quarantine
) -> Reason | None:
    told = quarantine.agree(f"{op}={candidate.qualified_name}", mine.detail if mine else "")
    if mine or not told:
        return mine
    return Reason(code=Code.PROBE_FAILED, detail=told, fix="See the output of that rank")


def _load_and_try(
    candidate: Candidate,
    requests: tuple[Request, ...],
    registry: Registry,
    quarantine: Quarantine | None,
) -> tuple[Kernel, Reason | None]:
    if quarantine and (reason := quarantine.kernel(candidate, requests)):
        return None, reason
    try:
        kernel = candidate.backend.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it rules out this kernel alone
        detail = f"loading it raised {type(error).__name__}: {error}"
        return None, Reason(
            code=Code.IMPORT_FAILED, detail=detail, fix="Reinstall the package it comes from"
        )
    reference = reference_for(candidate.backend.op, registry.candidates)
    if reference is None or reference is candidate or (quarantine and is_foreign(candidate)):
        return kernel, None
    for request in requests:
        reason = probe(kernel, reference.backend.load(), request)
        if reason is not None:
            return None, reason
    return kernel, None


def _not_requested(op: str) -> Kernel:
    def kernel(*_: object, **__: object) -> None:
        raise AssertionError(f"op {op!r} was called but never requested at start-up")

    return kernel
