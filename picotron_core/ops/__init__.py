"""The operations: one contract a file, and `Ops`, the bound kernels that a run calls."""

from __future__ import annotations

from dataclasses import dataclass

from picotron_core.ops.attention import Attention
from picotron_core.ops.comm import Comm
from picotron_core.ops.loss import Loss
from picotron_core.ops.norm import RMSNorm
from picotron_core.ops.optimizer import Optimizer
from picotron_core.ops.rope import Rope
from picotron_core.ops.swiglu import SwiGLU

OPS = ("attention", "norm", "rope", "swiglu", "loss", "optimizer", "comm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One bound kernel per op. Calling `ops.attention(...)` calls the backend's own function."""

    attention: Attention
    norm: RMSNorm
    rope: Rope
    swiglu: SwiGLU
    loss: Loss
    optimizer: Optimizer
    comm: Comm


__all__ = [
    "OPS",
    "Attention",
    "Comm",
    "Loss",
    "Ops",
    "Optimizer",
    "RMSNorm",
    "Rope",
    "SwiGLU",
]
