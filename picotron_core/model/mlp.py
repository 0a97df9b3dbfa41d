"""The gated MLP."""

from __future__ import annotations

from torch import Tensor, nn

from picotron_core import ops
from picotron_core.model.architecture import Architecture


class MLP(nn.Module):
    """down(silu(gate x) * up x): (B, T, E) -> (B, T, E)."""

    def __init__(self, architecture: Architecture, *, swiglu: ops.SwiGLU) -> None:
        super().__init__()
        E, F = architecture.hidden_size, architecture.intermediate_size
        self.gate_proj = nn.Linear(E, F, bias=False)
        self.up_proj = nn.Linear(E, F, bias=False)
        self.down_proj = nn.Linear(F, E, bias=False)
        self.swiglu = swiglu

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self.swiglu(self.gate_proj(x), self.up_proj(x)))
        return hidden
