"""What selection costs in a step: nothing, for the bound op is the kernel's own function.

    pytest benchmarks/bench_bound_op.py --benchmark-enable --benchmark-only

Compare the rows of one run: "bound" and "kernel" differ by less than 100 ns.
"""

from __future__ import annotations

import pytest
import torch

from picotron_core.hardware import look
from picotron_core.ops import Ops
from picotron_core.registry import Request
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve


@pytest.fixture(scope="module")
def bound_and_kernel():
    registry = load_registry()
    request = Request(op="swiglu", device=look("cpu"), dtype="float32")
    selections = resolve((), [request], registry.candidates)
    ops, _ = bind(selections, registry)
    kernel = selections["swiglu"].chosen.backend.load()
    assert isinstance(ops, Ops)
    assert ops.swiglu is kernel
    return ops, kernel


@pytest.mark.benchmark(group="one swiglu of 16 numbers")
@pytest.mark.parametrize("which", ["kernel", "bound"])
def test_call(benchmark, bound_and_kernel, which):
    ops, kernel = bound_and_kernel
    gate, up = torch.ones(16), torch.ones(16)
    # As the model calls it: the module keeps the callable, so that a step looks nothing up.
    call = ops.swiglu if which == "bound" else kernel
    benchmark(call, gate, up)
