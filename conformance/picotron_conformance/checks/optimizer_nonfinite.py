"""NaN and infinity in an optimizer's lists: seen where they reach, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from picotron_conformance.cases.optimizer import Updates
from picotron_conformance.check import Record, Target, WrongKernelError
from picotron_conformance.judge import judge
from picotron_conformance.updates import DTYPES, Numbers, golden, numbers_of, run

CASE = Updates(name="nan", shapes=((70,), (4, 3), (9,)), steps=1, state=True)
ODD = {0: (0, 37, 69), 2: (8,)}  # parameter -> elements: at the ends, and inside of a vector
# Where each part's numbers go. A parameter's own reach no moment.
REACHES = {
    "grad": ("update", "exp_avg", "exp_avg_sq"),
    "exp_avg": ("update", "exp_avg"),
    "exp_avg_sq": ("update", "exp_avg_sq"),
    "param": ("update",),
}
# What moments never hold unless training is lost already is not asked: formulas that are equal on
# numbers differ in whether infinity minus itself is in them.
VALUES = {
    "grad": (math.nan, math.inf, -math.inf),
    "exp_avg": (math.nan,),
    "exp_avg_sq": (math.nan,),
    "param": (math.nan, math.inf, -math.inf),
}


def not_finite(target: Target, record: Record) -> None:
    """A NaN reaches what is computed of it, as a NaN; an infinity as that or as an infinity; all
    other elements are right. Training looks for overflow by it.
    """
    numbers = numbers_of(CASE, target.seed)
    for part, values in VALUES.items():
        for value in values:
            lists, _ = run(target, CASE, target.seed, numbers=_with(numbers, part, value))
            for index, right in enumerate(golden(CASE, target.seed)):
                found = {name: kept.clone() for name, kept in lists.results(index).items()}
                for name in REACHES[part]:
                    # Of an odd parameter, the update shows nothing: NaN minus NaN.
                    shown = lists.params[index] if name == "update" else lists.states[name][index]
                    for place in ODD.get(index, ()):
                        _must_show(float(shown.reshape(-1)[place]), value, part, f"{name}[{place}]")
                        # That is settled; what is beside it is judged.
                        found[name].view(-1)[place] = float(right[name].value.view(-1)[place])
                _judged(found, index, part, value, target)


def _must_show(found: float, value: float, part: str, where: str) -> None:
    if math.isnan(found) or (math.isinf(value) and math.isinf(found)):
        return
    raise WrongKernelError(
        f"{value} in {part} gives {found:.6g} in {where}, must be "
        + ("NaN" if math.isnan(value) else "NaN or infinite"),
        hint="numbers that are clamped, cleared or skipped: overflow goes unseen",
    )


def _judged(found: dict[str, Tensor], index: int, part: str, value: float, target: Target) -> None:
    try:
        judge(found, golden(CASE, target.seed)[index], DTYPES, Record())
    except WrongKernelError as error:
        raise WrongKernelError(
            f"{value} in {part}, parameter {index}, beside it: {error.detail}",
            hint="one odd element that changes, or stops, the update of others",
        ) from None


def _with(numbers: Numbers, part: str, value: float) -> Numbers:
    """The numbers with `value` at the odd places of one part."""

    def odd(tensors: list[Tensor]) -> Iterator[Tensor]:
        for index, tensor in enumerate(tensors):
            flat = tensor.flatten().clone()
            flat[list(ODD.get(index, ()))] = value
            yield flat.view(tensor.shape)

    if part == "param":
        return replace(numbers, params=list(odd(list(numbers.params))))
    if part == "grad":
        return replace(numbers, grads=[list(odd(list(numbers.grads[0])))])
    states = {**numbers.states, part: list(odd(list(numbers.states[part])))}
    return replace(numbers, states=states)
