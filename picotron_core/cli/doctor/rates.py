"""In the child: how fast a device copies memory and multiplies matrices."""

from __future__ import annotations

import math
import time

import torch

from picotron_core.engine.metrics import matrix_product_rate
from picotron_core.errors import reason

COPY_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # no cache holds this
COPY_S = 0.2


def copy_rate(place: str) -> tuple[float | None, str]:
    """Bytes read and written per second by the best of some large copies, or why there are none."""
    device = torch.device(place)
    try:
        source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        best, end = math.inf, time.perf_counter() + COPY_S
        while (start := time.perf_counter()) < end or best == math.inf:
            target.copy_(source)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    except RuntimeError as error:  # out of memory, say
        return None, reason(error)
    return 2 * source.numel() / best, ""


def product_rate(dtype: str, place: str) -> tuple[float | None, str]:
    """FLOP/s, or why this device has none in the dtype."""
    try:
        return matrix_product_rate(getattr(torch, dtype), torch.device(place)), ""
    except RuntimeError as error:
        return None, reason(error)
