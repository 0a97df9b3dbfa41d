"""One call of a kernel on a case: where its tensors lay, and what came out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from picotron_conformance.check import (
    Record,
    Target,
    UndecidedError,
    Verdict,
    WrongKernelError,
)
from picotron_conformance.forms import FORMS, Form
from picotron_conformance.inputs import PACKED, Placed, place, place_together
from picotron_conformance.judge import judge
from picotron_conformance.problem import Case, Problem, golden_results, problem_of, results_of
from picotron_core.registry.types import Kernel

ROOM_FOR_FAR = 6 * 2**30  # bytes


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
    typed = {name: value.to(case.dtype_of(name, value)) for name, value in problem.tensors.items()}
    packed = {name: value for name, value in typed.items() if case.layout(name) == PACKED}
    together = place_together(packed, device)
    return {
        name: together.get(name) or place(value, value.dtype, case.layout(name), device)
        for name, value in typed.items()
    }


def placed_upstream(case: Case, problem: Problem, device: torch.device) -> dict[str, Placed]:
    return {
        name: place(value, case.dtype_of(name, value), case.upstream_layout, device)
        for name, value in problem.upstream.items()
    }


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
    if case.is_far and 0 < target.hardware.memory_bytes < ROOM_FOR_FAR:
        raise UndecidedError(Verdict.UNSUPPORTED, "tensors of 4 GiB do not fit here")
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
    if not upstream:
        with torch.no_grad():
            return forward(form, kernel, case, placed), {}
    leaves = leaves_of(form, placed, wants)
    outputs = forward(form, kernel, case, placed, leaves)
    reached = {name for leaf in leaves for name in form.reaches.get(leaf, case.outputs)}
    sent = {name: value for name, value in upstream.items() if name in reached}
    gradients = backward(form, case, outputs, leaves, sent)
    return {name: value.detach() for name, value in outputs.items()}, gradients


def leaves_of(
    form: Form, placed: Mapping[str, Placed], wants: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Leaves over the memory of the inputs that want a gradient; None means all that can."""
    wanted = form.gradients.keys() if wants is None else wants
    return {name: placed[name].tensor.detach().requires_grad_() for name in wanted}


def forward(
    form: Form,
    kernel: Kernel,
    case: Case,
    placed: Mapping[str, Placed],
    leaves: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    tensors = {name: leaves.get(name, value.tensor) for name, value in placed.items()}
    outputs = form.call(kernel, tensors, case.options)
    for name in case.outputs:
        if not isinstance(outputs.get(name), Tensor):
            raise WrongKernelError(f"{name} came back as {type(outputs.get(name)).__name__}")
    return outputs


def backward(
    form: Form,
    case: Case,
    outputs: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    upstream: Mapping[str, Placed],
    *,
    again: bool = False,
) -> dict[str, Tensor | None]:
    """Gradients by name. again: keep the graph for another backward."""
    for name in upstream:
        if not outputs[name].requires_grad:
            raise WrongKernelError(
                f"{name} has no gradient although {', '.join(leaves)} want one",
                hint="a kernel that detaches, or looks at the first input alone",
            )
    found = torch.autograd.grad(
        [outputs[name] for name in upstream],
        list(leaves.values()),
        [upstream[name].tensor for name in upstream],
        allow_unused=True,
        retain_graph=again,
    )
    gradients: dict[str, Tensor | None] = {
        form.gradients[name]: grad for name, grad in zip(leaves, found, strict=True)
    }
    if len(upstream) < len(case.outputs):  # of what does not depend on an output, None is zero
        zeros = {form.gradients[name]: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        return {n: zeros[n] if grad is None else grad for n, grad in gradients.items()}
    return gradients


def unharmed(placed: Mapping[str, Placed]) -> None:
    for name, value in placed.items():
        if touched := value.touched():
            raise WrongKernelError(
                f"{name} was {touched}",
                hint="an in-place operation on the caller's tensor, or a store out of bounds",
            )


def unaliased(placed: Mapping[str, Placed], outputs: Mapping[str, Tensor]) -> None:
    """No output shares memory with an input."""
    owners = {value.tensor.untyped_storage().data_ptr(): name for name, value in placed.items()}
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
    """Judge a run's results against the golden ones of its case. only: names of results."""
    seed = target.seed if seed is None else seed
    right = golden_results(case, seed, target.candidate.backend.tier)
    dtypes = results_of(case, training=training)
    chosen = {name: right[name] for name in dtypes if only is None or name in only}
    judge(found.results, chosen, dtypes, record, device=target.device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal to the last bit, NaN and the sign of zero included."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
