"""Attention backends against each other, forward and backward; compare rows of one run only.

pytest benchmarks/bench_attention.py --benchmark-enable --benchmark-only
"""

from __future__ import annotations

import pytest
import torch

from picotron_core.registry.plugins import load_registry

KERNELS = {
    candidate.backend.name: candidate.backend.load()
    for candidate in load_registry().candidates
    if candidate.backend.op == "attention"
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [512, 2048])
def test_forward_and_backward(benchmark, backend, dtype, length):
    benchmark.group = f"attention S={length} {dtype}"
    q, k, v = (
        torch.randn(2, heads, length, 64, dtype=dtype, requires_grad=True) for heads in (8, 4, 4)
    )
    upstream = torch.randn_like(q)

    def step() -> None:
        out = KERNELS[backend](q, k, v, causal=True)
        torch.autograd.grad(out, (q, k, v), upstream)

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
