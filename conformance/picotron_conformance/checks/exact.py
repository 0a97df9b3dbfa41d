"""Probes whose answer is known to the last bit: blind to small errors, but to no wrong index."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from picotron_conformance.calling import run
from picotron_conformance.cases.probes import Probe, probes_of
from picotron_conformance.check import Check, Profile, Record, Target, WrongKernelError
from picotron_conformance.forms import FORMS
from picotron_conformance.limits import LIMITS
from picotron_conformance.problem import problem_of
from picotron_conformance.rounding import UNIT
from picotron_core.hardware import Device

NOTHING = 2.0**-24  # of the largest


def checks(op: str, dtype: str, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    for probe in probes_of(op, dtype):
        for training in (False, True) if probe.gradients else (False,):
            yield Check(
                op=op,
                name="exact",
                case=f"{probe.case.name}{'-gradient' if training else ''}",
                dtype=dtype,
                aspect="exact",
                request=probe.case.request(device, training=training),
                run=partial(exact, probe=probe, training=training),
            )


def exact(target: Target, record: Record, *, probe: Probe, training: bool) -> None:
    """16-bit results to the bit, float32 results to some units in the last place."""
    case = probe.case
    problem = problem_of(case, target.seed)
    upstream = problem.upstream if training else {}
    golden = FORMS[case.op].golden(problem.tensors, upstream, **case.options)
    found = run(target, case, training=training).results
    for name in probe.gradients if training else case.outputs:
        value = found[name]
        if value is None:
            raise WrongKernelError(f"{name}: no gradient came back")
        _compare(name, value.cpu(), golden[name].reshape(value.shape), hint=probe.means)


def _compare(name: str, found: Tensor, golden: Tensor, *, hint: str) -> None:
    wanted = golden.to(found.dtype).double()
    # What a softmax leaves of the keys that were not taken is not exactly nothing.
    rest = NOTHING * wanted.abs().max() if wanted.numel() else 0.0
    allowed = torch.where(wanted.abs() < rest, rest, 0.0)
    if found.dtype == torch.float32:
        allowed += LIMITS["exact_float32"].value * 2 * UNIT[torch.float32] * wanted.abs()
    wrong = ~((found.double() - wanted).abs() <= allowed) & (found.double() != wanted)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise WrongKernelError(
            f"{name}{list(index)} is {float(found[index]):.7g}, must be exactly "
            f"{float(wanted[index]):.7g}; wrong {int(wrong.sum())} of {wrong.numel()}",
            hint=hint,
        )
