"""One kernel on one device in one dtype, really launched: the trial run that training makes."""

from __future__ import annotations

import torch

from picotron_core.errors import reason
from picotron_core.registry import Candidate, Kernel, Level, Request
from picotron_core.registry.plugins import Registry
from picotron_core.registry.probe import probe

COMM_S = 30.0


def launch(candidate: Candidate, request: Request, registry: Registry, place: str) -> str:
    """What went wrong; "" where nothing did."""
    try:
        kernel = candidate.backend.load()
        if request.op == "comm":
            return _all_reduce(kernel, torch.device(place))
        refused = probe(kernel, _reference(request.op, registry), request)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a kernel's failure is the finding
        return f"{type(error).__name__}: {reason(error)}"
    return "" if refused is None else refused.detail


def is_poisoned(place: str) -> bool:
    """Whether a failed launch left a CUDA context in which everything fails from now on."""
    if not place.startswith("cuda"):
        return False
    try:
        torch.ones(1, device=place).add_(1).item()
    except RuntimeError:
        return True
    return False


def _all_reduce(comm: Kernel, place: torch.device) -> str:
    """A group of this process alone: it needs the transport and a network to speak over."""
    comm.start(store=None, rank=0, world_size=1, device=place, timeout_s=COMM_S)
    try:
        tensor = torch.ones(4, device=place)
        comm.all_reduce(tensor).wait()
        total = tensor.sum().item()
    finally:
        comm.stop()
    return "" if total == 4 else f"the sum of four ones over one rank is {total}"


def _reference(op: str, registry: Registry) -> Kernel:
    """The bundled backend that reads like the equations."""
    return next(
        candidate.backend.load()
        for candidate in registry.candidates
        if candidate.backend.op == op
        and candidate.provider.bundled
        and candidate.backend.level is Level.REFERENCE
    )
