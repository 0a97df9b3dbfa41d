"""Calls that are not the plain training step: fewer gradients, none, second ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

from picotron_conformance.calling import (
    Run,
    backward,
    forward,
    judge_run,
    leaves_of,
    placed_tensors,
    placed_upstream,
    run,
)
from picotron_conformance.check import (
    Check,
    Profile,
    Record,
    Target,
    UndecidedError,
    Verdict,
    WrongKernelError,
    hinted,
)
from picotron_conformance.claimed import Question, claimed, of_each_kind, question, trained
from picotron_conformance.forms import FORMS
from picotron_conformance.judge import Golden, golden_of, judge
from picotron_conformance.problem import Case, problem_of, results_of
from picotron_conformance.rounding import Rounding
from picotron_core.hardware import Device

# Second derivatives are judged coarsely: few train with them, but a wrong one must not be given.
SECOND = 1e-2  # of the norm of the right one
SMALL = 700  # elements of an output: the oracles walk over queries and tokens


def checks(op: str, dtype: str, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    questions: dict[str, Question] = {
        "no-gradient": no_gradient,
        "inference": inference,
        "some-gradients": some_gradients,
        "same-tensor": same_tensor,
    }
    if dtype == "float32":
        questions["second-derivative"] = second_derivative
    for name, ask in questions.items():
        yield question(op, name, dtype, "special", ask)


def no_gradient(target: Target, record: Record, op: str, dtype: str) -> None:
    """Under no_grad, and where no input wants a gradient, results want none and are as right."""
    cases, _ = claimed(target, op, dtype)
    form = FORMS[op]
    for case, enabled in product(of_each_kind(cases), (False, True)):
        placed = placed_tensors(case, problem_of(case, target.seed), target.device)
        leaves: Mapping[str, Tensor] = {} if enabled else leaves_of(form, placed)
        with torch.set_grad_enabled(enabled):
            outputs = forward(form, target.kernel, case, placed, leaves)
        for name, value in outputs.items():
            if value.requires_grad:
                where = "no input wants one" if enabled else "it was made under no_grad"
                raise WrongKernelError(f"{name} requires a gradient, although {where}")
        judge_run(target, case, Run(placed, outputs, {}), record, training=False)


def inference(target: Target, record: Record, op: str, dtype: str) -> None:
    """Under inference_mode, as in generation."""
    cases, _ = claimed(target, op, dtype)
    case = cases[0]
    placed = placed_tensors(case, problem_of(case, target.seed), target.device)
    with torch.inference_mode():
        tensors = {name: value.tensor.clone() for name, value in placed.items()}
        outputs = FORMS[op].call(target.kernel, tensors, case.options)
    judge_run(target, case, Run(placed, outputs, {}), record, training=False)


def some_gradients(target: Target, record: Record, op: str, dtype: str) -> None:
    """Each choice of inputs that want a gradient: frozen weights, a first layer, LoRA."""
    cases, form = trained(target, op, dtype), FORMS[op]
    subsets = [s for n in range(1, len(form.gradients)) for s in combinations(form.gradients, n)]
    for case, wants in product(of_each_kind(cases), subsets):
        with hinted(f"a backward that gives nothing, or too much, if only {wants} want it"):
            found = run(target, case, training=True, wants=wants)
            only = {*case.outputs, *(form.gradients[name] for name in wants)}
            judge_run(target, case, found, record, training=True, only=only)


def same_tensor(target: Target, record: Record, op: str, dtype: str) -> None:
    """One tensor given for two inputs gets the sum of their gradients."""
    form = FORMS[op]
    if not form.alike:
        raise UndecidedError(Verdict.UNSUPPORTED, "no two inputs of this op are alike")
    first, second = form.alike
    cases = trained(target, op, dtype, wanted=lambda case: _may_be_same(case, first, second))
    for case in of_each_kind(cases):
        problem = problem_of(case, target.seed)
        placed = placed_tensors(case, problem, target.device)
        placed = {**placed, second: placed[first]}
        leaves = leaves_of(form, placed, [name for name in form.gradients if name != second])
        outputs = forward(form, target.kernel, case, placed, {**leaves, second: leaves[first]})
        upstream = placed_upstream(case, problem, target.device)
        found = {**outputs, **backward(form, case, outputs, leaves, upstream)}
        right = _right_of_same(case, target.seed, target.candidate.backend.tier)
        dtypes = results_of(case, training=True)
        with hinted(f"{first} and {second}, here one tensor, told apart by their address"):
            judge(found, right, dtypes, record, device=target.device)


@lru_cache(maxsize=512)
def _right_of_same(case: Case, seed: int, tier: str) -> dict[str, Golden]:
    """Kept, as `golden_results` are: all backends of an op are asked the same."""
    form, problem = FORMS[case.op], problem_of(case, seed)
    first, second = form.alike
    tensors = {**problem.tensors, second: problem.tensors[first]}
    expected = results_of(case, training=True)

    def compute(at: Rounding) -> dict[str, Tensor]:
        results = dict(form.golden(tensors, problem.upstream, **case.options, at=at))
        lost = results.pop(form.gradients[second])
        results[form.gradients[first]] = at.stored(results[form.gradients[first]] + lost)
        return {name: value for name, value in results.items() if name in expected}

    return golden_of(compute, dtype=getattr(torch, case.dtype), tier=tier, seed=seed)


def _may_be_same(case: Case, first: str, second: str) -> bool:
    shapes = {name: value.shape for name, value in problem_of(case, 0).tensors.items()}
    same = shapes[first] == shapes[second] and case.layout(first) == case.layout(second)
    return same and not case.layouts_overlap and not case.is_far and 0 not in case.sizes.values()


def second_derivative(target: Target, record: Record, op: str, dtype: str) -> None:
    """Differentiating the gradients raises, or is right."""
    case, form = trained(target, op, dtype, wanted=_is_small)[0], FORMS[op]
    problem = problem_of(case, target.seed)
    placed = placed_tensors(case, problem, target.device)

    def kernel(leaves: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return forward(form, target.kernel, case, placed, leaves)

    def oracle(leaves: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return form.oracle({**problem.tensors, **leaves}, case.options)

    exact = {n: problem.tensors[n].clone().requires_grad_() for n in form.gradients}
    wanted = _second(oracle, exact, problem.upstream)
    try:
        found = _second(kernel, leaves_of(form, placed), problem.upstream)
    except (RuntimeError, NotImplementedError) as refusal:
        record.notes.append(f"raised {type(refusal).__name__}")
        return
    for name, right in wanted.items():
        error = torch.linalg.vector_norm(found[name].cpu().double() - right)
        scale = torch.linalg.vector_norm(right)
        if not error <= SECOND * scale + 1e-6:
            raise WrongKernelError(
                f"the second derivative for {name} is off by {float(error / (scale + 1e-30)):.2g}",
                hint="a backward that treats what it saved as constant: @once_differentiable "
                "makes that an error",
            )


def _second(
    function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    leaves: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients of the sum of the squares of the first gradients, by input.

    The first upstream gradient depends on the outputs, as in any real loss, so that there is a
    second derivative even where a backward takes all else for constant.
    """
    outputs = function(leaves)
    losses = [
        (outputs[n] * (up.to(outputs[n]) + outputs[n] / 2)).sum() for n, up in upstream.items()
    ]
    first = torch.autograd.grad(losses, list(leaves.values()), create_graph=True)
    total = sum((gradient.square().sum() for gradient in first), start=torch.zeros(()))
    # As a user would, and not autograd.grad: that passes by the nodes that exist only to raise.
    total.backward()  # type: ignore[no-untyped-call]
    return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def _is_small(case: Case) -> bool:
    sizes = [torch.Size(shape).numel() for shape in case.outputs.values()]
    return max(sizes) <= SMALL and min(sizes) > 0 and not case.layouts_overlap
