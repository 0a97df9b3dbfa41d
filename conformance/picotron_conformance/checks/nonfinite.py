"""NaN and infinities: they reach whatever depends on them, so that a run that went wrong is seen.

A loss scaler sees an overflow by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from picotron_conformance.calling import call, forward, placed_tensors, placed_upstream
from picotron_conformance.check import Check, Profile, Record, Target, WrongKernelError
from picotron_conformance.claimed import Question, claimed, of_each_kind, question, trained
from picotron_conformance.forms import FORMS
from picotron_conformance.inputs import Placed
from picotron_conformance.problem import Case, Problem, problem_of
from picotron_core.hardware import Device

Where = tuple[int, ...]


def checks(op: str, dtype: str, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    questions: dict[str, Question] = {
        "nan": nan,
        "nan-gradient": nan_gradient,
        "nan-upstream": nan_upstream,
    }
    for name, ask in questions.items():
        yield question(op, name, dtype, "special", ask)


def nan(target: Target, record: Record, op: str, dtype: str) -> None:
    """A NaN or infinity in an input reaches the results that depend on it, and no others."""
    cases, _ = claimed(target, op, dtype, wanted=_is_plain)
    # torch's own CPU kernel forgets an infinite query in 16 bits; in float32 none may.
    infinite = dtype == "float32" or op != "attention"
    values = (torch.nan, torch.inf) if infinite else (torch.nan,)
    for case, name, value in product(of_each_kind(cases), FORMS[op].gradients, values):
        problem = problem_of(case, target.seed)
        for where in _places(problem.tensors[name], few=case is not cases[0]):
            placed = placed_tensors(case, problem, target.device)
            placed[name].tensor[where] = value
            with torch.no_grad():
                found = forward(FORMS[op], target.kernel, case, placed)
            what = f"{case.name}: {value} at {list(where)} of {name}"
            right, depends = _outputs(case, problem, name, where, value)
            _reaches(found, right, depends, what)
            if case is cases[0]:  # masks may be added: -inf hides all but a NaN
                _stays(found, right, depends, what, value)


def nan_gradient(target: Target, record: Record, op: str, dtype: str) -> None:
    """A NaN in an input reaches the gradients that depend on it."""
    cases, form = trained(target, op, dtype, wanted=_is_plain), FORMS[op]
    for case, name in product(of_each_kind(cases), form.gradients):
        problem = problem_of(case, target.seed)
        for where in _places(problem.tensors[name], few=case is not cases[0]):
            placed = placed_tensors(case, problem, target.device)
            placed[name].tensor[where] = torch.nan
            found = _gradients(target, case, placed, problem)
            changed = _with(problem.tensors, name, where, None)
            depends = _differ(
                form.golden(problem.tensors, problem.upstream, **case.options),
                form.golden(changed, problem.upstream, **case.options),
            )
            spoiled = _with(problem.tensors, name, where, torch.nan)
            right = form.golden(spoiled, problem.upstream, **case.options)
            _reaches(found, right, depends, f"{case.name}: nan at {list(where)} of {name}")


def nan_upstream(target: Target, record: Record, op: str, dtype: str) -> None:
    """A NaN or infinity in an upstream gradient reaches the gradients that depend on it."""
    cases, form = trained(target, op, dtype, wanted=_is_plain), FORMS[op]
    for case, value in product(of_each_kind(cases), (torch.nan, torch.inf)):
        problem = problem_of(case, target.seed)
        for name, upstream in problem.upstream.items():
            for where in _places(upstream, few=case is not cases[0]):
                placed = placed_tensors(case, problem, target.device)
                found = _gradients(target, case, placed, problem, (name, where, value))
                changed = _with(problem.upstream, name, where, None)
                depends = _differ(
                    form.golden(problem.tensors, problem.upstream, **case.options),
                    form.golden(problem.tensors, changed, **case.options),
                )
                spoiled = _with(problem.upstream, name, where, value)
                right = form.golden(problem.tensors, spoiled, **case.options)
                what = f"{case.name}: {value} at {list(where)} of the gradient of {name}"
                _reaches(found, right, depends, what)


def _gradients(
    target: Target,
    case: Case,
    placed: Mapping[str, Placed],
    problem: Problem,
    spoiled: tuple[str, Where, float] | None = None,
) -> dict[str, Tensor]:
    """spoiled: the upstream gradient, its element, and what that becomes."""
    upstream = placed_upstream(case, problem, target.device)
    if spoiled:
        name, where, value = spoiled
        upstream[name].tensor[where] = value
    _, gradients = call(FORMS[case.op], target.kernel, case, placed, upstream)
    return {name: value for name, value in gradients.items() if value is not None}


def _outputs(
    case: Case, problem: Problem, name: str, where: Where, value: float
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The golden outputs with `value` there, and which elements depend on that place."""
    golden = FORMS[case.op].golden
    right = golden(_with(problem.tensors, name, where, value), {}, **case.options)
    changed = golden(_with(problem.tensors, name, where, None), {}, **case.options)
    return right, _differ(golden(problem.tensors, {}, **case.options), changed)


def _with(
    tensors: Mapping[str, Tensor], name: str, where: Where, value: float | None
) -> dict[str, Tensor]:
    """The tensors with one element replaced; None: by another number, to see what follows it."""
    one = tensors[name].clone()
    one[where] = one[where] + 1.0 if value is None else value
    return {**tensors, name: one}


def _differ(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: a[name] != b[name] for name in a}


def _reaches(
    found: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    depends: Mapping[str, Tensor],
    what: str,
) -> None:
    for name, value in found.items():
        wanted = depends[name] & ~right[name].isfinite()
        if value.cpu().isfinite()[wanted.reshape(value.shape)].any():
            raise WrongKernelError(
                f"{what} does not reach {name}, which depends on it",
                hint="a maximum, a clamp or nan_to_num that drops it: a broken run would look well",
            )


def _stays(
    found: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    depends: Mapping[str, Tensor],
    what: str,
    value: float,
) -> None:
    """Infinities may still meet their opposite, or a zero, on another way to the result."""
    for name, result in found.items():
        if not math.isnan(value):
            continue
        apart = (right[name].isfinite() & ~depends[name]).reshape(result.shape)
        if result.cpu().isnan()[apart].any():
            raise WrongKernelError(
                f"{what} reaches {name} where that does not depend on it",
                hint="rows, heads or batches that are mixed, or 0 * NaN of what is hidden",
            )


def _places(value: Tensor, *, few: bool) -> list[Where]:
    """The first element, one in the middle, and the last; few: the one in the middle."""
    parts = (0.4,) if few else (0, 0.4, 1)
    places = (tuple(round(part * (size - 1)) for size in value.shape) for part in parts)
    return list(dict.fromkeys(places))


def _is_plain(case: Case) -> bool:
    """No element stands for several, and there are some."""
    return not case.layouts_overlap and 0 not in case.sizes.values()
