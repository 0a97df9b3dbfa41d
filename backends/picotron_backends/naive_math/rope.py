"""Rotary position embedding as its equation is written."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # the same for all heads
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    # float32 tables lift 16-bit halves to float32, so there is one rounding, at the end
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
