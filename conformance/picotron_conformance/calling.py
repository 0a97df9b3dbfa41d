"""Cases of the functional ops, and one call of a kernel on a case."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor

from picotron_conformance.check import Record, Target, WrongKernelError
from picotron_conformance.forms import FORMS, Form
from picotron_conformance.inputs import Placed, as_laid_out, place
from picotron_conformance.judge import Golden, golden_of, judge
from picotron_conformance.rounding import Rounding
from picotron_core.hardware import Device
from picotron_core.registry.types import Kernel, Request


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

    def layout(self, name: str) -> str:
        return self.layouts.get(name, self.layouts.get("", "contiguous"))

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
    form, dtype = FORMS[case.op], getattr(torch, case.dtype)

    def rounded(name: str, value: Tensor, layout: str) -> Tensor:
        if not value.is_floating_point():
            return value
        kept = torch.float32 if name in form.always_float32 else dtype
        return as_laid_out(value, layout).to(kept).double()

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


@lru_cache(maxsize=1024)
def _golden(case: Case, seed: int, tier: str, training: bool) -> dict[str, Golden]:
    problem = problem_of(case, seed)

    def compute(at: Rounding) -> dict[str, Tensor]:
        upstream = problem.upstream if training else {}
        results = FORMS[case.op].golden(problem.tensors, upstream, **case.options, at=at)
        return {name: value for name, value in results.items() if name in expected}

    expected = results_of(case, training=training)
    return golden_of(compute, dtype=getattr(torch, case.dtype), tier=tier, seed=seed)


def results_of(case: Case, *, training: bool) -> dict[str, torch.dtype]:
    """The results that a case judges, with the dtype that each must have."""
    form, dtype = FORMS[case.op], getattr(torch, case.dtype)
    kept = {n: torch.float32 if n in form.always_float32 else dtype for n in case.outputs}
    return kept | (dict.fromkeys(form.gradients.values(), dtype) if training else {})


@dataclass(frozen=True, slots=True)
class Run:
    """One call of a kernel: where its tensors lay, and what came out."""

    placed: Mapping[str, Placed]
    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]

    @property
    def results(self) -> dict[str, Tensor | None]:
        return {**self.outputs, **self.gradients}


def placed_tensors(case: Case, problem: Problem, device: torch.device) -> dict[str, Placed]:
    form, dtype = FORMS[case.op], getattr(torch, case.dtype)
    return {
        name: place(
            value,
            _dtype_of(value, torch.float32 if name in form.always_float32 else dtype),
            case.layout(name),
            device,
        )
        for name, value in problem.tensors.items()
    }


def placed_upstream(case: Case, problem: Problem, device: torch.device) -> dict[str, Placed]:
    form, dtype = FORMS[case.op], getattr(torch, case.dtype)
    return {
        name: place(
            value,
            torch.float32 if name in form.always_float32 else dtype,
            case.upstream_layout,
            device,
        )
        for name, value in problem.upstream.items()
    }


def _dtype_of(value: Tensor, floating: torch.dtype) -> torch.dtype:
    return floating if value.is_floating_point() else value.dtype


def run(
    target: Target,
    case: Case,
    *,
    training: bool,
    wants: Collection[str] | None = None,
    seed: int | None = None,
) -> Run:
    """Call the kernel on freshly placed tensors, backward included where `training`.

    Args:
        wants: the inputs that require a gradient; None means all that can.

    Raises: WrongKernelError where an input or its surroundings were written to, or an output shares
        memory with an input.
    """
    form = FORMS[case.op]
    problem = problem_of(case, target.seed if seed is None else seed)
    placed = placed_tensors(case, problem, target.device)
    upstream = placed_upstream(case, problem, target.device) if training else {}
    outputs, gradients = call(form, target.kernel, case, placed, upstream, wants=wants)
    unharmed({**placed, **{f"d{name}": value for name, value in upstream.items()}})
    unaliased(placed, outputs)
    return Run(placed, outputs, gradients)


def call(
    form: Form,
    kernel: Kernel,
    case: Case,
    placed: Mapping[str, Placed],
    upstream: Mapping[str, Placed],
    *,
    wants: Collection[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """(outputs, gradients) of one call; without upstream gradients under `no_grad`."""
    tensors = {name: value.tensor for name, value in placed.items()}
    if not upstream:
        with torch.no_grad():
            return _answer(case, form.call(kernel, tensors, case.options)), {}
    wanted = form.gradients.keys() if wants is None else wants
    for name in wanted:
        tensors[name] = tensors[name].detach().requires_grad_()
    outputs = _answer(case, form.call(kernel, tensors, case.options))
    for name in upstream:
        if not outputs[name].requires_grad:
            raise WrongKernelError(
                f"{name} has no gradient although {', '.join(wanted)} want one",
                hint="a kernel that detaches, or looks at the first input alone",
            )
    found = torch.autograd.grad(
        [outputs[name] for name in upstream],
        [tensors[name] for name in wanted],
        [upstream[name].tensor for name in upstream],
        allow_unused=True,
    )
    gradients: dict[str, Tensor | None] = {
        form.gradients[name]: value for name, value in zip(wanted, found, strict=True)
    }
    if len(upstream) < len(case.outputs):  # of what does not depend on an output, None is zero
        for name in wanted:
            if gradients[form.gradients[name]] is None:
                gradients[form.gradients[name]] = torch.zeros_like(tensors[name])
    return {name: value.detach() for name, value in outputs.items()}, gradients


def _answer(case: Case, outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    for name in case.outputs:
        if not isinstance(outputs.get(name), Tensor):
            raise WrongKernelError(
                f"{name}: the kernel returned {type(outputs.get(name)).__name__}"
            )
    return dict(outputs)


def unharmed(placed: Mapping[str, Placed]) -> None:
    for name, value in placed.items():
        if touched := value.touched():
            raise WrongKernelError(
                f"{name} was {touched}",
                hint="an in-place operation on the caller's tensor, or a store out of bounds",
            )


def unaliased(placed: Mapping[str, Placed], outputs: Mapping[str, Tensor]) -> None:
    """No output shares memory with an input."""
    owners = {value.buffer.untyped_storage().data_ptr(): name for name, value in placed.items()}
    for name, output in outputs.items():
        other = owners.get(output.untyped_storage().data_ptr())
        if other is not None and output.numel():
            raise WrongKernelError(
                f"{name} shares its memory with {other}",
                hint="a view of an input given out as a result",
            )


def judge_run(
    target: Target,
    case: Case,
    found: Run,
    record: Record,
    *,
    training: bool,
    seed: int | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Judge a run's results against the golden ones of its case."""
    right = _golden(
        case, target.seed if seed is None else seed, target.candidate.backend.tier, training
    )
    chosen = {name: value for name, value in right.items() if only is None or name in only}
    judge(
        found.results,
        chosen,
        results_of(case, training=training),
        record,
        device=target.device,
    )
