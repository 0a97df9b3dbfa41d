"""What selection costs in a step: nothing, for the bound op is the kernel's own function.

    pytest benchmarks/bench_bound_op.py --benchmark-enable --benchmark-only

Compare the rows of one run: "bound" and "kernel" differ by less than 100 ns.
"""

from __future__ import annotations

import pytest
import torch

from picotron_core.hardware import look
from picotron_core.ops import OPS
from picotron_core.registry import Request
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve


@pytest.fixture(scope="module")
def bound_and_kernels():
    registry = load_registry()
    requests = [Request(op=op, device=look("cpu"), dtype="float32") for op in OPS]
    selections = resolve((), requests, registry.candidates)
    ops, _ = bind(selections, registry)
    kernels = {op: selection.chosen.backend.load() for op, selection in selections.items()}
    for op, kernel in kernels.items():
        assert getattr(ops, op) is kernel
    return ops, kernels


@pytest.mark.benchmark(group="one swiglu of 16 numbers")
@pytest.mark.parametrize("which", ["kernel", "bound"])
def test_call(benchmark, bound_and_kernels, which):
    ops, kernels = bound_and_kernels
    gate, up = torch.ones(16), torch.ones(16)
    # As the model calls it: the module keeps the callable, so that a step looks nothing up.
    call = ops.swiglu if which == "bound" else kernels["swiglu"]
    benchmark(call, gate, up)
