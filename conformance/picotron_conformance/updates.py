"""Runs of an optimizer: its lists, some updates by a kernel, and their golden results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import cycle

import torch
from torch import Generator, Tensor

from picotron_conformance.cases.optimizer import Updates, gradients
from picotron_conformance.check import Record, Target, WrongKernelError, hinted
from picotron_conformance.golden.optimizer import adamw
from picotron_conformance.inputs import Placed, as_laid_out, place
from picotron_conformance.judge import Golden, golden_of, judge
from picotron_conformance.rounding import Rounding
from picotron_core.ops.optimizer import STATES
from picotron_core.registry.types import Kernel

DTYPES = dict.fromkeys(("update", *STATES), torch.float32)


@dataclass(frozen=True, slots=True)
class Lists:
    """What the kernel is called with. params[i] belongs to exp_avg[i] and exp_avg_sq[i]."""

    params: Sequence[Placed]
    states: Mapping[str, Sequence[Placed]]
    start: Sequence[Tensor]  # the parameters before, in float64

    def results(self, index: int) -> dict[str, Tensor]:
        moved = self.params[index].tensor.detach().double().cpu() - self.start[index]
        states = {name: kept[index].tensor for name, kept in self.states.items()}
        return {"update": moved.float(), **states}


@dataclass(frozen=True, slots=True)
class Numbers:
    """float64 numbers that are float32, by parameter; gradients by update, then parameter."""

    params: Sequence[Tensor]
    states: Mapping[str, Sequence[Tensor]]
    grads: Sequence[Sequence[Tensor]]


def numbers_of(case: Updates, seed: int) -> Numbers:
    generator = Generator().manual_seed(seed)

    def rounded(value: Tensor, part: str) -> Tensor:
        return as_laid_out(value.double(), case.layouts.get(part, "contiguous")).float().double()

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    held = float(case.state)
    return Numbers(
        params=[rounded(case.params * normal(shape), "param") for shape in case.shapes],
        states={
            "exp_avg": [rounded(held * normal(shape), "state") for shape in case.shapes],
            "exp_avg_sq": [
                rounded(held * normal(shape).square(), "state") for shape in case.shapes
            ],
        },
        grads=[
            [rounded(gradients(case.grads, shape, generator), "grad") for shape in case.shapes]
            for _ in range(case.steps)
        ],
    )


@lru_cache(maxsize=512)
def golden(case: Updates, seed: int) -> list[dict[str, Golden]]:
    """By parameter: the right results and their noise."""
    numbers = numbers_of(case, seed)

    def compute(at: Rounding, index: int) -> dict[str, Tensor]:
        return adamw(
            numbers.params[index],
            numbers.states["exp_avg"][index],
            numbers.states["exp_avg_sq"][index],
            [grads[index] for grads in numbers.grads],
            first_step=case.first_step,
            hyper=case.hyper,
            at=at,
        )

    return [
        golden_of(
            partial(compute, index=index),
            dtype=torch.float32,
            tier="A",
            seed=seed,
            coherent=True,
        )
        for index in range(len(case.shapes))
    ]


def placed_lists(target: Target, case: Updates, numbers: Numbers) -> Lists:
    def placed(value: Tensor, part: str) -> Placed:
        layout = case.layouts.get(part, "contiguous")
        return place(value, torch.float32, layout, target.device)

    return Lists(
        [placed(value, "param") for value in numbers.params],
        {name: [placed(v, "state") for v in kept] for name, kept in numbers.states.items()},
        numbers.params,
    )


def run(
    target: Target, case: Updates, seed: int, kernels: Sequence[Kernel] = ()
) -> tuple[Lists, Numbers]:
    """All updates of a case, by the kernel under test, or by `kernels` in turn.

    Raises: WrongKernelError where a gradient was written to, or memory around a tensor.
    """
    numbers = numbers_of(case, seed)
    lists = placed_lists(target, case, numbers)
    layout = case.layouts.get("grad", "contiguous")
    turn = cycle(kernels or [target.kernel])
    for step, grads in enumerate(numbers.grads, start=case.first_step):
        placed = [place(grad, torch.float32, layout, target.device) for grad in grads]
        next(turn)(
            [value.tensor for value in lists.params],
            [value.tensor for value in placed],
            {name: [value.tensor for value in kept] for name, kept in lists.states.items()},
            step=step,
            hyper=case.hyper,
        )
        for number, value in enumerate(placed):
            if touched := value.touched():
                raise WrongKernelError(f"gradient {number} was {touched}")
    for name, kept in {"param": lists.params, **lists.states}.items():
        for number, value in enumerate(kept):
            if value.spilled():
                raise WrongKernelError(f"{name} {number} was written to outside of its bounds")
    return lists, numbers


def judge_lists(target: Target, record: Record, case: Updates, lists: Lists, seed: int) -> None:
    for index, right in enumerate(golden(case, seed)):
        with hinted(f"parameter {index} of {len(case.shapes)}, of shape {case.shapes[index]}"):
            judge(lists.results(index), right, DTYPES, record)
