"""Runs of an optimizer: its lists, some updates by a kernel, and their golden results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import cycle
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from picotron_conformance.cases.optimizer import Updates, gradients
from picotron_conformance.check import Record, Target, WrongKernelError
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

    params: list[Tensor]
    states: dict[str, list[Tensor]]
    start: Sequence[Tensor]  # the parameters before, in float64
    memory: Mapping[str, Sequence[Placed]]  # by name: all that must not be spilled over

    def results(self, index: int) -> dict[str, Tensor]:
        moved = self.params[index].detach().double().cpu() - self.start[index]
        states = {name: kept[index] for name, kept in self.states.items()}
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
            for _ in case.schedule
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
            case.schedule,
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
    def placed(values: Sequence[Tensor], part: str) -> tuple[list[Tensor], Sequence[Placed]]:
        return place_list(values, case.layouts.get(part, "contiguous"), target.device)

    params, memory = placed(numbers.params, "param")
    placed_states = {name: placed(kept, "state") for name, kept in numbers.states.items()}
    return Lists(
        params,
        {name: tensors for name, (tensors, _) in placed_states.items()},
        numbers.params,
        {"param": memory, **{name: theirs for name, (_, theirs) in placed_states.items()}},
    )


def place_list(
    values: Sequence[Tensor], layout: str, device: torch.device
) -> tuple[list[Tensor], Sequence[Placed]]:
    """The tensors, and the memory to be guarded.

    Beside the layouts of `inputs`: "flat", all of them without a gap in one buffer, as ZeRO-1 has
    them, and "flat-reversed", where the last one comes first.
    """
    if layout not in ("flat", "flat-reversed"):
        memory = [place(value, torch.float32, layout, device) for value in values]
        return [placed.tensor for placed in memory], memory
    order = values if layout == "flat" else values[::-1]
    joined = torch.cat([torch.zeros(0), *(value.flatten() for value in order)])
    whole = place(joined, torch.float32, "contiguous", device)
    parts = torch.split(whole.tensor, [value.numel() for value in order]) if order else ()
    tensors = [part.view(value.shape) for part, value in zip(parts, order, strict=True)]
    return tensors if layout == "flat" else tensors[::-1], [whole]


def run(
    target: Target,
    case: Updates,
    seed: int,
    kernels: Sequence[Kernel] = (),
    *,
    numbers: Numbers | None = None,
    lists: Lists | None = None,
) -> tuple[Lists, Numbers]:
    """All updates of a case, by the kernel under test, or by `kernels` in turn.

    Args:
        numbers: others than those of the seed. lists: their place, where there is one already.

    Raises: WrongKernelError where a gradient was written to, or memory around a tensor.
    """
    numbers = numbers or numbers_of(case, seed)
    lists = lists or placed_lists(target, case, numbers)
    turn = cycle(kernels or [target.kernel])
    grads: list[Tensor] = []
    memory: Sequence[Placed] = ()
    for update, (number, hyper) in enumerate(case.schedule):
        memory = _next_gradients(target, case, numbers.grads[update], grads, memory)
        if case.lists == "moved" and update:
            _move(lists, by_data=update % 2 == 0)
        params, given, states = _given(case, lists, grads)
        next(turn)(params, given, states, step=number, hyper=hyper)
        for index, placed in enumerate(memory):
            if touched := placed.touched():
                raise WrongKernelError(f"gradient {index} was {touched}")
    for name, memory in lists.memory.items():
        for index, placed in enumerate(memory):
            if placed.spilled():
                raise WrongKernelError(f"{name} {index} was written to outside of its bounds")
    return lists, numbers


def _next_gradients(
    target: Target,
    case: Updates,
    values: Sequence[Tensor],
    grads: list[Tensor],
    memory: Sequence[Placed],
) -> Sequence[Placed]:
    """Put the next gradients into `grads`, and in the memory of those before if lists are kept.

    Returns: the memory, as it is before the kernel gets it.
    """
    if case.lists == "kept" and memory:
        for kept, value in zip(grads, values, strict=True):
            kept.copy_(value)
        return [replace(p, before=p.buffer.clone(), version=p.tensor._version) for p in memory]
    grads[:], memory = place_list(values, case.layouts.get("grad", "contiguous"), target.device)
    return memory


def _move(lists: Lists, *, by_data: bool) -> None:
    """All tensors to new memory while they still hold the old, so that the addresses differ."""
    for tensors in (lists.params, *lists.states.values()):
        copies = [tensor.clone() for tensor in tensors]
        if by_data:
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.data = copy
        else:
            tensors[:] = copies


def _given(
    case: Updates, lists: Lists, grads: list[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor], Mapping[str, Sequence[Tensor]]]:
    """What the kernel is called with: the contract asks for sequences and a mapping, no more."""
    if case.lists == "new":
        return list(lists.params), list(grads), {n: list(kept) for n, kept in lists.states.items()}
    if case.lists == "tuples":
        states = {name: tuple(lists.states[name]) for name in reversed(STATES)}
        return tuple(lists.params), tuple(grads), MappingProxyType(states)
    return lists.params, grads, lists.states


def judge_lists(target: Target, record: Record, case: Updates, lists: Lists, seed: int) -> None:
    for index, right in enumerate(golden(case, seed)):
        found = lists.results(index)
        try:
            judge(found, right, DTYPES, record)
        except WrongKernelError as error:
            hint = f"parameter {index} of {len(case.shapes)}, of shape {case.shapes[index]}"
            if _of_float32_betas(found, right, case, seed, index):
                hint += "; it fits 1 - beta of a float32 beta: subtract in float64"
            raise WrongKernelError(error.detail, hint=hint) from None


def _of_float32_betas(
    found: Mapping[str, Tensor], right: Mapping[str, Golden], case: Updates, seed: int, index: int
) -> bool:
    """Whether wrong moments are explained by betas rounded to float32 before 1 - beta."""

    def narrow(beta: float) -> float:
        return float(torch.tensor(beta, dtype=torch.float32))

    numbers = numbers_of(case, seed)
    explained = adamw(
        numbers.params[index],
        numbers.states["exp_avg"][index],
        numbers.states["exp_avg_sq"][index],
        [grads[index] for grads in numbers.grads],
        [
            (number, replace(hyper, beta1=narrow(hyper.beta1), beta2=narrow(hyper.beta2)))
            for number, hyper in case.schedule
        ],
    )

    def distance(name: str, wanted: Tensor) -> float:
        return float((found[name].detach().cpu().double() - wanted).square().sum())

    return any(
        distance(name, explained[name]) < 0.1 * distance(name, right[name].value) for name in STATES
    )
