"""What a run measures of itself."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step: a line of `metrics.jsonl`."""

    step: int
    tokens: int  # since the run's first step
    loss: float | None  # nats per token; None where it overflowed
    grad_norm: float | None  # before clipping; None where it overflowed
    lr: float
    tokens_per_s: float
    mfu: float | None  # model FLOPs over the device's measured matrix-product rate; None unmeasured
    step_s: float
    peak_memory_bytes: int  # of this rank's process, or of its CUDA device
    loss_scale: float | None = None  # float16 only
    skipped: bool = False  # the update was skipped for an overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One evaluation: a line of `metrics.jsonl`."""

    step: int
    tokens: int
    val_loss: float  # nats per token
    bits_per_byte: float


Record = StepRecord | EvalRecord


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token -> bits per byte of text: comparable between tokenizers."""
    return loss / math.log(2) / bytes_per_token


def matrix_product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of large square products here and now: the ceiling that MFU refers to.

    Products of 1024 on a CPU, of 8192 on a GPU, which smaller ones do not fill; until 0.2 s have
    passed, which warms its clocks. The best one counts: on a shared machine the others measure the
    neighbours.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(a, b)
    _wait_for(device)
    best, end = math.inf, time.perf_counter() + 0.2
    while (start := time.perf_counter()) < end:
        torch.mm(a, b)
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the CUDA device's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows keeps no such count in the standard library
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kibibytes elsewhere
