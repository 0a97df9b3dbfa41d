"""The records of the suite: a check, what it may say, and what it measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from picotron_core.hardware import Device
from picotron_core.registry.types import Candidate, Request

if TYPE_CHECKING:
    import torch

Profile = Literal["quick", "full", "fuzz"]

# The columns of the matrix: what a check is about.
ASPECTS = {
    "forward": "values of the outputs",
    "gradient": "values of every gradient",
    "exact": "cases whose answer is known to the last bit",
    "state": "nothing is kept between calls, nothing is changed outside",
    "special": "NaN, infinity, no gradient wanted, second derivatives",
    "claims": "what the declaration promises: determinism, memory, torch.compile",
    "refusals": "what is not claimed is refused, never computed",
}


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"  # the kernel is wrong
    ERROR = "ERROR"  # the kernel raised on what it claims, or the check itself broke
    TIMEOUT = "TIMEOUT"
    UNSUPPORTED = "UNSUPPORTED"  # not claimed, and held to it: the kernel refused, or was right
    NOT_RUN = "NOT_RUN"  # this machine cannot run it, or the session ended before it


EXECUTED = frozenset({Verdict.PASS, Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT})


class WrongKernelError(AssertionError):
    """What a check raises. `detail` says what broke; `hint` names the bug that looks like this."""

    def __init__(self, detail: str, *, hint: str = "") -> None:
        super().__init__(f"{detail}\n  looks like: {hint}" if hint else detail)
        self.detail, self.hint = detail, hint


class UndecidedError(Exception):
    """What a check raises that cannot or need not judge: `verdict` is NOT_RUN or UNSUPPORTED."""

    def __init__(self, verdict: Verdict, detail: str) -> None:
        super().__init__(detail)
        self.verdict, self.detail = verdict, detail


@contextmanager
def hinted(hint: str) -> Iterator[None]:
    """Give a wrong result in the block the cause that the check is about."""
    try:
        yield
    except WrongKernelError as error:
        raise WrongKernelError(error.detail, hint=hint) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One result against its limits. `worst` is the largest fraction of a limit; above 1 it fails.

    fractions: by limit ("element", "row", "tensor", "bias"): measured / allowed.
    index, found, wanted: the worst element.
    """

    result: str  # "out", "dq", "exp_avg"
    shape: tuple[int, ...]
    dtype: str
    fractions: Mapping[str, float]
    index: tuple[int, ...] = ()
    found: float = 0.0
    wanted: float = 0.0

    @property
    def worst(self) -> float:
        return max(self.fractions.values(), default=0.0)


@dataclass(slots=True)
class Record:
    """What a check writes down while it runs."""

    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # lines for the report that judge nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The kernel under test and how hard to try.

    changes: what loading the kernel changed in the process, which must be nothing.
    """

    candidate: Candidate
    kernel: Any
    hardware: Device
    device: torch.device
    profile: Profile
    seed: int
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question to one backend: `run` returns if the answer is good, else WrongKernelError.

    name: the family, e.g. "values"; case: what it is asked on, e.g. "gqa-T17-S33". Together with
        the dtype they are the check's id, the same on every machine for one seed.
    request: the claim it rests on. Where `supports` has reasons against it, `refused` is asked
        instead, if there is one: a kernel must refuse what it does not claim.
    """

    op: str
    name: str
    case: str
    dtype: str
    aspect: str
    run: Callable[[Target, Record], None]
    request: Request | None = None
    refused: Callable[[Target, Record], None] | None = None
    seconds: float = 60.0  # the watchdog's limit

    @property
    def id(self) -> str:
        return "-".join(part for part in (self.name, self.dtype, self.case) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One line of the report."""

    id: str  # "attention=picotron/sdpa-values-float32-gqa"
    op: str
    backend: str  # the qualified name
    check: str
    case: str
    dtype: str
    aspect: str
    verdict: Verdict
    detail: str = ""
    hint: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    reproduce: str = ""
