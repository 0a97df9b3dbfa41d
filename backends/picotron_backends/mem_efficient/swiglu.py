"""SwiGLU that keeps gate and up alone: silu(gate) is made again in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """One tensor less than autograd would keep per layer, for one more pass over memory."""
    y: Tensor = SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


class SwiGLU(torch.autograd.Function):
    """dgate = dy up silu'(gate);  dup = dy silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        wants_gate, wants_up = ctx.needs_input_grad
        # aten's silu_backward is silu' times its first argument in a single pass.
        dgate = torch.ops.aten.silu_backward(dy * up, gate) if wants_gate else None
        dup = silu(gate).mul_(dy) if wants_up else None
        return dgate, dup
