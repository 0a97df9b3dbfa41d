"""What the declaration promises beyond right values: determinism, memory, compilation, identity."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from picotron_conformance.calling import (
    backward,
    forward,
    judge_run,
    leaves_of,
    placed_tensors,
    placed_upstream,
    run,
    same_bits,
)
from picotron_conformance.cases import growing
from picotron_conformance.check import (
    Check,
    Profile,
    Record,
    Target,
    UndecidedError,
    Verdict,
    WrongKernelError,
)
from picotron_conformance.claimed import Question, claimed, of_each_kind, question
from picotron_conformance.forms import FORMS
from picotron_conformance.launched import folders_entered, names_launched, peak_bytes
from picotron_conformance.problem import Case, problem_of, results_of
from picotron_core.errors import PicotronError
from picotron_core.hardware import Device
from picotron_core.registry.plugins import load_registry

RUNS = 5
# Twice the length may take so many times the memory: 2 is linear, 4 is quadratic.
GROWTH = 2.6
COMPILED = 4  # cases
FALLBACK = "a silent fallback: refuse in `supports` what the kernel cannot do"


def checks(op: str, dtype: str, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    questions: dict[str, Question] = {
        "deterministic": deterministic,
        "launches": launches,
        "own-code": own_code,
    }
    if dtype == "float32":
        questions |= {"memory": memory, "compile": compiles, "fake-tensor": fake_tensor}
    for name, ask in questions.items():
        yield question(op, name, dtype, "claims", ask)


def deterministic(target: Target, record: Record, op: str, dtype: str) -> None:
    """The same numbers in other memory give the same bits."""
    if not target.candidate.backend.deterministic:
        raise UndecidedError(Verdict.UNSUPPORTED, "it does not claim to be deterministic")
    cases, training = claimed(target, op, dtype)
    largest = sorted(cases, key=lambda case: case.elements)[-2:]
    for case in [*largest, *of_each_kind(cases)]:
        first = run(target, case, training=training).results
        for _ in range(RUNS - 1):
            again = run(target, case, training=training).results
            for name, value in first.items():
                other = again[name]
                if value is None or other is None or not same_bits(value, other):
                    raise WrongKernelError(
                        f"{case.name}: {name} differs between two calls on the same numbers",
                        hint="atomic additions, or a race; declare deterministic=False if meant",
                    )


def memory(target: Target, record: Record, op: str, dtype: str) -> None:
    """Twice the length takes twice the memory, inputs aside, not four times."""
    backend = target.candidate.backend
    if backend.memory != "linear":
        raise UndecidedError(Verdict.UNSUPPORTED, "it claims nothing about memory")
    asked = 0
    for pair, training in product(growing(op, dtype), (True, False)):
        if any(backend.supports(c.request(target.hardware, training=training)) for c in pair):
            continue
        asked += 1
        small, large = (_peak(target, case, record, training=training) for case in pair)
        if not large <= GROWTH * small:
            raise WrongKernelError(
                f"twice the length takes {large / max(1, small):.2g} times the memory: "
                + "; ".join(record.notes[-2:]),
                hint="a whole matrix of logits, a mask, or a table that is kept",
            )
    if not asked:
        raise UndecidedError(Verdict.UNSUPPORTED, "it claims no case that is long enough")


def _peak(target: Target, case: Case, record: Record, *, training: bool) -> int:
    call = _bare_call(target, case, training=training)
    call()  # what is allocated once
    peak = peak_bytes(call, target.device)
    how = "" if training else " without gradients"
    record.notes.append(f"{case.name} {dict(case.sizes)}{how}: {peak} bytes at the peak")
    return peak


def compiles(target: Target, record: Record, op: str, dtype: str) -> None:
    """Right under torch.compile(fullgraph=True); by aot_eager, which needs no compiler."""
    _claims_compilation(target)
    compiled: Any = torch.compile(target.kernel, fullgraph=True, backend="aot_eager")
    cases, training = claimed(target, op, dtype)
    try:
        for case in cases[:COMPILED]:
            torch.compiler.reset()  # as a new shape, or torch would try to make shapes symbols
            found = run(replace(target, kernel=compiled), case, training=training)
            judge_run(target, case, found, record, training=training)
    finally:
        torch.compiler.reset()


def fake_tensor(target: Target, record: Record, op: str, dtype: str) -> None:
    """On tensors without content it gives the shapes and dtypes of the real results."""
    _claims_compilation(target)
    cases, _ = claimed(target, op, dtype)
    for case in cases[:COMPILED]:
        problem = problem_of(case, target.seed)
        with FakeTensorMode(), torch.no_grad():
            tensors = {
                name: torch.empty(
                    value.shape, dtype=case.dtype_of(name, value), device=target.device
                )
                for name, value in problem.tensors.items()
            }
            outputs = FORMS[op].call(target.kernel, tensors, case.options)
        for name, wanted in results_of(case, training=False).items():
            found = outputs[name]
            if tuple(found.shape) != case.outputs[name] or found.dtype != wanted:
                raise WrongKernelError(
                    f"{case.name}: {name} is {found.dtype} {tuple(found.shape)} on fake tensors, "
                    f"must be {wanted} {case.outputs[name]}"
                )


def launches(target: Target, record: Record, op: str, dtype: str) -> None:
    """Every call shows one of the kernels that the backend says it launches."""
    cases, training = claimed(target, op, dtype)
    for case in cases:
        if 0 not in case.sizes.values():  # nothing to do is done without a launch
            ran_its_kernel(target, partial(run, target, case, training=training), case.name)


def own_code(target: Target, record: Record, op: str, dtype: str) -> None:
    """No call enters the code of another backend."""
    cases, training = claimed(target, op, dtype)
    for case in cases:
        ran_no_other(target, partial(run, target, case, training=training), case.name)


def ran_its_kernel(target: Target, call: Callable[[], object], what: str) -> None:
    """Raise where none of the kernels ran that the backend names."""
    patterns = target.candidate.backend.launches
    if not patterns:
        raise UndecidedError(Verdict.UNSUPPORTED, "it names no kernel that it launches")
    names = names_launched(call, target.device)
    if not any(fnmatch(name, pattern) for name in names for pattern in patterns):
        raise WrongKernelError(
            f"{what}: none of {', '.join(patterns)} ran, but {', '.join(sorted(names))}",
            hint=FALLBACK,
        )


def ran_no_other(target: Target, call: Callable[[], object], what: str) -> None:
    """Raise where a call enters the code of another backend of the op."""
    others, seen = _folders_of_others(target), set[str]()
    with folders_entered(others.keys(), seen):
        call()
    if seen:
        raise WrongKernelError(f"{what}: the code of {others[seen.pop()]} ran", hint=FALLBACK)


def _folders_of_others(target: Target) -> Mapping[str, str]:
    own = _folder_of(target.kernel)
    return {f: name for f, name in _folders(target.candidate.backend.op).items() if f != own}


@cache
def _folders(op: str) -> Mapping[str, str]:
    """By folder of source files, the bundled backend of the op whose kernel stands there."""
    folders = {}
    for candidate in load_registry().candidates:
        if candidate.backend.op != op:
            continue
        try:
            folders[_folder_of(candidate.backend.load())] = candidate.qualified_name
        except (ImportError, PicotronError):
            continue  # one that cannot be loaded cannot be fallen back to
    return {folder: name for folder, name in folders.items() if folder}


def _folder_of(kernel: Any) -> str:
    code = getattr(inspect.unwrap(kernel), "__code__", None) if callable(kernel) else None
    return "" if code is None else os.path.dirname(code.co_filename)


def _claims_compilation(target: Target) -> None:
    if not target.candidate.backend.compiles:
        raise UndecidedError(Verdict.UNSUPPORTED, "it does not claim to compile")


def _bare_call(target: Target, case: Case, *, training: bool) -> Callable[[], None]:
    """A forward, with its backward if `training`, on tensors that are there already."""
    problem, form = problem_of(case, target.seed), FORMS[case.op]
    placed = placed_tensors(case, problem, target.device)
    upstream = placed_upstream(case, problem, target.device)

    def call() -> None:
        if not training:
            with torch.no_grad():
                forward(form, target.kernel, case, placed)
            return
        leaves = leaves_of(form, placed)
        outputs = forward(form, target.kernel, case, placed, leaves)
        backward(form, case, outputs, leaves, upstream)

    return call
