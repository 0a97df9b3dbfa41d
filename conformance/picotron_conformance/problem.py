"""A case: one call to an op, its numbers, and its golden results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor

from picotron_conformance.forms import FORMS
from picotron_conformance.inputs import FAR, as_laid_out
from picotron_conformance.judge import Golden, golden_of
from picotron_conformance.rounding import Rounding
from picotron_core.hardware import Device
from picotron_core.registry.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The numbers of one call: float64 tensors (or integers) before they are rounded and placed."""

    tensors: Mapping[str, Tensor]
    upstream: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One call to an op: what is asked, how its tensors are made and how they lie in memory.

    draw: makes the tensors, by name, of a generator.
    outputs: the shape of each result. upstream: those that a gradient comes back to.
    layouts: by tensor name, "" for all others; upstream_layout is that of the gradients.
    kind: what besides features may send a kernel another way.
    """

    op: str
    name: str
    dtype: str
    draw: Callable[[Generator], Mapping[str, Tensor]]
    outputs: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    features: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    upstream: tuple[str, ...] = ()
    upstream_layout: str = "contiguous"
    upstream_scale: float = 1.0
    upstream_shift: float = 0.0
    kind: str = ""

    @property
    def is_far(self) -> bool:
        """Whether some tensor's rows lie gigabytes apart."""
        return FAR in {*self.layouts.values(), self.upstream_layout}

    @property
    def elements(self) -> int:
        """Of all outputs."""
        return sum(math.prod(shape) for shape in self.outputs.values())

    @property
    def layouts_overlap(self) -> bool:
        """Whether several elements of a tensor share one place in memory."""
        return bool({"broadcast", "scalar"} & {*self.layouts.values(), self.upstream_layout})

    def layout(self, name: str) -> str:
        return self.layouts.get(name, self.layouts.get("", "contiguous"))

    def dtype_of(self, name: str, value: Tensor) -> torch.dtype:
        """What a kernel gets `value`, the tensor of that name, in."""
        if not value.is_floating_point():
            return value.dtype
        wide = name in FORMS[self.op].always_float32
        dtype: torch.dtype = torch.float32 if wide else getattr(torch, self.dtype)
        return dtype

    def request(self, device: Device, *, training: bool) -> Request:
        return Request(
            op=self.op,
            device=device,
            dtype=self.dtype,
            training=training,
            features=self.features,
            sizes=self.sizes,
        )


def problem_of(case: Case, seed: int) -> Problem:
    """The case's numbers: the same for one seed on every machine, already rounded to its dtype."""
    generator = torch.Generator().manual_seed(seed)

    def rounded(name: str, value: Tensor, layout: str) -> Tensor:
        if not value.is_floating_point():
            return value
        return as_laid_out(value, layout).to(case.dtype_of(name, value)).double()

    tensors = {
        name: rounded(name, value, case.layout(name))
        for name, value in case.draw(generator).items()
    }
    upstream = {}
    for name in case.upstream:
        value = torch.randn(case.outputs[name], generator=generator, dtype=torch.float64)
        value = value * case.upstream_scale + case.upstream_shift
        upstream[name] = rounded(name, value, case.upstream_layout)
    return Problem(tensors=tensors, upstream=upstream)


@lru_cache(maxsize=4096)
def golden_results(case: Case, seed: int, tier: str) -> dict[str, Golden]:
    """Outputs and gradients with their noise. Kept: all backends of an op are asked the same."""
    problem = problem_of(case, seed)
    expected = results_of(case, training=True)

    def compute(at: Rounding) -> dict[str, Tensor]:
        results = FORMS[case.op].golden(problem.tensors, problem.upstream, **case.options, at=at)
        return {name: value for name, value in results.items() if name in expected}

    return golden_of(compute, dtype=getattr(torch, case.dtype), tier=tier, seed=seed)


def results_of(case: Case, *, training: bool) -> dict[str, torch.dtype]:
    """The results that a case judges, with the dtype that each must have."""
    form, dtype = FORMS[case.op], getattr(torch, case.dtype)
    kept = {n: torch.float32 if n in form.always_float32 else dtype for n in case.outputs}
    return kept | (dict.fromkeys(form.gradients.values(), dtype) if training else {})
