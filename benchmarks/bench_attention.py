"""Attention backends, forward and backward, at S = 512.

    pytest benchmarks/bench_attention.py --benchmark-enable --benchmark-only

Compare rows of one run, by `Min`: the rest of the machine moves the other columns.
"""

from __future__ import annotations

import pytest
import torch

from picotron_core.hardware import look
from picotron_core.registry import Request
from picotron_core.registry.plugins import load_registry

B, H, K, T, D = 4, 8, 4, 512, 48
KERNELS = {
    candidate.backend.name: candidate.backend
    for candidate in load_registry().candidates
    if candidate.backend.op == "attention"
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_backward(benchmark, name, dtype):
    benchmark.group = f"B={B} H={H} K={K} S={T} D={D}, causal, {dtype}"
    device = look()
    asked = Request(op="attention", device=device, dtype=dtype, sizes={"H": H, "K": K, "D": D})
    if KERNELS[name].supports(asked):
        pytest.skip(f"{name} does not serve {dtype} on {device}")
    kernel = KERNELS[name].load()
    place = {"device": device.type, "dtype": getattr(torch, dtype)}
    q, k, v = (torch.randn(B, n, T, D, **place, requires_grad=True) for n in (H, K, K))
    upstream = torch.randn_like(q)

    def step() -> None:
        torch.autograd.grad(kernel(q, k, v, causal=True), (q, k, v), upstream)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
