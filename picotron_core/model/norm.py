"""The norm of the residual stream, before attention, before the MLP and before the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from picotron_core import ops


class RMSNorm(nn.Module):
    """(..., E) -> (..., E), scaled by `weight` (E,)."""

    def __init__(self, size: int, *, eps: float, norm: ops.RMSNorm) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, eps=self.eps)
