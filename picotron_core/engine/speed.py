"""How fast a step may be, before it was ever made: its FLOPs over a rate of matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from picotron_core.engine.kernel_memory import Work
from picotron_core.hardware import Device

# The share of a rate that a whole step reaches: an assumption. Of measured matrix products the demo
# had 0.42 on two CPU cores. Published rates are reached by no product; of them large models report
# 0.21 to 0.46 (Chowdhery et al. 2022, arXiv:2204.02311, table 3), small ones on fast cards less.
EFFICIENCY = {"measured": 0.4, "published": 0.3}

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
    """What a step of one rank may take."""

    rate: float  # FLOP/s of matrix products
    source: Literal["measured", "published"]
    efficiency: float  # assumed: the share of the rate that a step reaches
    step_s: float  # of one update
    tokens_per_s: float


def published_rate(device: Device, dtype: str) -> float | None:
    """FLOP/s of a card in a dtype by `PUBLISHED`; None where that has no number."""
    teraflops = PUBLISHED.get(device.name, {}).get(dtype)
    return None if teraflops is None else teraflops * 1e12


def predict(work: Work, rate: float, source: Literal["measured", "published"]) -> Speed:
    """The time of a step whose FLOPs go at `EFFICIENCY` of `rate`, in FLOP/s."""
    efficiency = EFFICIENCY[source]
    tokens = work.tokens * work.accumulation
    layers = max(stage.layers for stage in work.stages)  # the others wait for this one
    slowest = replace(work.architecture, num_hidden_layers=layers)
    step_s = slowest.flops_per_token(work.seq_len) * tokens / (rate * efficiency)
    return Speed(
        rate=rate,
        source=source,
        efficiency=efficiency,
        step_s=step_s,
        tokens_per_s=tokens / step_s,
    )
