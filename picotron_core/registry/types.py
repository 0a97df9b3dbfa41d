"""The typed records of the registry: what a backend declares and what selection answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal

from picotron_core.hardware import Device

Kernel = Any  # a callable (or, for comm, an object) that keeps its op's contract


class Level(IntEnum):
    """The default rank of a backend for a request; the highest that can serve wins `auto`."""

    REFERENCE = 0  # reads like the equations
    PORTABLE = 10  # works anywhere torch does
    ACCELERATED = 20  # a fused or hardware kernel
    SPECIALIZED = 30  # made for just this request


class Code(StrEnum):
    """Why a backend may not serve a request."""

    DEVICE = "device"
    CAPABILITY = "capability"  # this card is too old or too new
    DTYPE = "dtype"
    SHAPE = "shape"
    FEATURE = "feature"
    TRAINING = "training"  # it has no backward
    WORLD_SIZE = "world_size"
    NOT_INSTALLED = "not_installed"
    VERSION = "version"
    IMPORT_FAILED = "import_failed"
    PROBE_FAILED = "probe_failed"
    QUARANTINED = "quarantined"  # it hurt a process that was there to be hurt, or a run
    DECLARATION = "declaration"  # its own `supports` or `level` raised


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why not, and how to mend it."""

    code: Code
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.detail}. {self.fix}" if self.fix else self.detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """All that decides whether a backend may serve.

    dtype: torch's name of the compute dtype, as text so that declaring needs no torch.
    features: what the op is asked to do beyond its plainest form, e.g. "causal", "gqa".
    sizes: the shapes that matter by their letters, e.g. {"H": 8, "K": 4, "D": 64, "world": 2}.
    """

    op: str
    device: Device
    dtype: str
    training: bool = True
    features: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One implementation of one op, declared as data.

    level: its rank, or a function of the request where the rank depends on it.
    load: returns the kernel; only called once the backend was chosen, so it may import anything.
    supports: reasons why it may not serve a request; empty means it may. Cheap, imports nothing.
    requires: distributions it needs, e.g. ("acme-kernels>=2,<3",): checked without importing them.

    The rest are claims, and the conformance suite holds the backend to each:

    tier: "A" keeps the precision that the contract asks for. "B" may round the contract's float32
        intermediates (logits, statistics) to the inputs' dtype, and float32 products to TF32.
    deterministic: the same inputs give the same bits.
    memory: "linear": what a forward and backward take beyond their inputs grows with each size, and
        with no product of two lengths, such as T * S in attention or N * V in the loss.
    compiles: works under torch.compile(fullgraph=True) and on fake tensors.
    launches: patterns (fnmatch) of names in torch's profiler, one of which every call must show, so
        that a fallback inside the kernel is seen: ("acme::flash_fwd", "acme_flash_kernel*").
    """

    op: str
    name: str
    level: Level | Callable[[Request], Level]
    load: Callable[[], Kernel]
    supports: Callable[[Request], Sequence[Reason]]
    requires: tuple[str, ...] = ()
    tier: Literal["A", "B"] = "A"
    deterministic: bool = True
    memory: Literal["", "linear"] = ""
    compiles: bool = False
    launches: tuple[str, ...] = ()
    summary: str = ""  # one line for `picotron backends`


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """The plugin that a backend came from."""

    plugin: str  # the entry point's name; "picotron" for the bundled backends
    distribution: str
    version: str
    bundled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A backend with where it came from."""

    backend: Backend
    provider: Provider

    @property
    def qualified_name(self) -> str:
        return f"{self.provider.plugin}/{self.backend.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one backend answered: its level, and the reasons against it (none: it can serve)."""

    candidate: Candidate
    level: Level
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which backend serves an op, what was refused and why, and who decided."""

    op: str
    requests: tuple[Request, ...]
    asked: tuple[str, ...]  # the names asked for, or ("auto",)
    source: str  # "command line", "environment", "file" or "auto"
    chosen: Candidate
    runners_up: tuple[Candidate, ...]  # who follows, in order, if `chosen` cannot be loaded
    refused: tuple[Verdict, ...]


def kernel_from(path: str) -> Callable[[], Kernel]:
    """A `load` that imports "package.module:attribute" when it is called."""

    def load() -> Kernel:
        module, _, attribute = path.partition(":")
        return getattr(importlib.import_module(module), attribute)

    return load


def normalise(name: str) -> str:
    """One spelling per name: `mem-efficient`, `Mem_Efficient` -> `mem_efficient`.

    Names are compared in this form and shown in the form in which they were declared.
    """
    return name.strip().lower().replace("-", "_")
