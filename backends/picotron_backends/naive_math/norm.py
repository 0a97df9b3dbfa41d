"""RMS norm as its equation is written."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = exact.square().mean(dim=-1, keepdim=True)
    return (exact * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight
