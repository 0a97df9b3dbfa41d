"""How fast a step may be, before it was ever made: its FLOPs over a rate of matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from picotron_core.engine.kernel_memory import Work
from picotron_core.hardware import Device

# The share of the rate of bare matrix products that a whole step reaches. An assumption: the demo
# was measured at 0.42 on two CPU cores, large models on accelerators are reported from 0.2 to 0.5
# (Chowdhery et al. 2022, arXiv:2204.02311, table 3). Small models on fast cards reach less.
EFFICIENCY = 0.4

# TFLOP/s by the names of hardware.PROFILES: dense, sums in float32, at boost clock. From NVIDIA's
# data sheets (P100 and V100 for PCIe, T4, A100, H100 SXM) and architecture papers (GTX 980, GTX
# 1080, Turing appendix A, GA102, Ada, RTX Blackwell). 16 bits: of tensor cores. The P100 has none,
# and torch's float16 products, which sum in float32, run there at float32's rate. float32: without
# TF32, which Picotron does not turn on.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "GTX 980": {"float32": 4.6},
    "GTX 1080": {"float32": 8.9},
    "Tesla P100": {"float32": 9.3, "float16": 9.3},
    "Tesla V100": {"float32": 14.0, "float16": 112.0},
    "Tesla T4": {"float32": 8.1, "float16": 65.0},
    "RTX 2080": {"float32": 10.1, "float16": 40.3},
    "A100": {"float32": 19.5, "float16": 312.0, "bfloat16": 312.0},
    "RTX 3090": {"float32": 35.6, "float16": 71.0, "bfloat16": 71.0},
    "RTX 4090": {"float32": 82.6, "float16": 165.2, "bfloat16": 165.2},
    "H100": {"float32": 66.9, "float16": 989.4, "bfloat16": 989.4},
    "RTX 5090": {"float32": 104.8, "float16": 209.5, "bfloat16": 209.5},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """rate: FLOP/s of matrix products, measured here or published. step_s: of one update."""

    rate: float
    measured: bool
    step_s: float
    tokens_per_s: float  # of one rank


def published_rate(device: Device, dtype: str) -> float | None:
    """FLOP/s of a card in a dtype by `PUBLISHED`; None where that has no number."""
    teraflops = PUBLISHED.get(device.name, {}).get(dtype)
    return None if teraflops is None else teraflops * 1e12


def predict(work: Work, rate: float, *, measured: bool) -> Speed:
    """The time of a step at EFFICIENCY of `rate` (FLOP/s); updates and collectives are left out."""
    tokens = work.tokens * work.accumulation
    flops = work.architecture.flops_per_token(work.seq_len) * tokens
    step_s = flops / (rate * EFFICIENCY)
    return Speed(rate=rate, measured=measured, step_s=step_s, tokens_per_s=tokens / step_s)
