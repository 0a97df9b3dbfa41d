"""From selections to bound kernels: load the chosen, try them, fall back only here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from picotron_core.errors import BackendError
from picotron_core.ops import Ops
from picotron_core.registry.plugins import Registry, notify
from picotron_core.registry.probe import probe
from picotron_core.registry.types import Candidate, Code, Kernel, Level, Reason, Selection, Verdict

log = logging.getLogger("picotron")


def bind(
    selections: Mapping[str, Selection], registry: Registry
) -> tuple[Ops, tuple[Selection, ...]]:
    """Load and try each selection's kernel, in its order, and freeze the winners.

    Returns: the bound kernels (an op that nobody requested is a kernel that says so when called),
        and the selections as they came to be, with whatever failed here among the refused.
    Raises: BackendError with every reason, where no kernel of an op's selection is left.
    """
    kernels: dict[str, Kernel] = {}
    final = []
    for op, selection in selections.items():
        kernels[op], settled = _first_that_works(selection, registry)
        final.append(settled)
        notify(registry, "picotron_on_selection", selection=settled)
    missing = {op: _not_requested(op) for op in Ops.__slots__ if op not in kernels}
    return Ops(**kernels, **missing), tuple(final)


def _first_that_works(selection: Selection, registry: Registry) -> tuple[Kernel, Selection]:
    refused = list(selection.refused)
    queue = [selection.chosen, *selection.runners_up]
    for number, candidate in enumerate(queue):
        kernel, reason = _load_and_try(candidate, selection, registry)
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


def _load_and_try(
    candidate: Candidate, selection: Selection, registry: Registry
) -> tuple[Kernel, Reason | None]:
    try:
        kernel = candidate.backend.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it rules out this kernel alone
        detail = f"loading it raised {type(error).__name__}: {error}"
        return None, Reason(
            code=Code.IMPORT_FAILED, detail=detail, fix="Reinstall the package it comes from"
        )
    reference = _reference(selection.op, registry.candidates)
    if reference is None or reference is candidate:
        return kernel, None
    for request in selection.requests:
        reason = probe(kernel, reference.backend.load(), request)
        if reason is not None:
            return None, reason
    return kernel, None


def _reference(op: str, candidates: Iterable[Candidate]) -> Candidate | None:
    """The bundled backend whose level is plainly REFERENCE: what the others are tried against."""
    return next(
        (
            candidate
            for candidate in candidates
            if candidate.backend.op == op
            and candidate.provider.bundled
            and candidate.backend.level is Level.REFERENCE
        ),
        None,
    )


def _not_requested(op: str) -> Kernel:
    def kernel(*_: object, **__: object) -> None:
        raise AssertionError(f"op {op!r} was called but never requested at start-up")

    return kernel
