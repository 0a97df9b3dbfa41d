"""Right SwiGLUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Sigmoid = Callable[[Tensor], Tensor]


class _ByHand(torch.autograd.Function):
    """In float32, rounded once; sigmoid is made again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, sigmoid: Sigmoid) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.sigmoid = sigmoid
        return (gate.float() * sigmoid(gate.float()) * up.float()).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (x.float() for x in ctx.saved_tensors)
        s = ctx.sigmoid(gate)
        dgate = dy.float() * up * s * (1 + gate * (1 - s))
        return dgate.to(dy.dtype), (dy.float() * gate * s).to(dy.dtype), None


def _divided(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def division(gate: Tensor, up: Tensor) -> Tensor:
    y: Tensor = _ByHand.apply(gate, up, _divided)
    return y


def silu_rounded(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


class _KeepsSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        s = torch.sigmoid(gate.float())
        ctx.save_for_backward(gate, up, s)
        return (gate.float() * s * up.float()).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, s = ctx.saved_tensors
        slope = s + gate.float() * s * (1 - s)
        return ((dy * up).float() * slope).to(dy.dtype), dy * (gate.float() * s).to(dy.dtype)


def sigmoid_kept(gate: Tensor, up: Tensor) -> Tensor:
    y: Tensor = _KeepsSigmoid.apply(gate, up)
    return y


def slope_in_two_terms(gate: Tensor, up: Tensor) -> Tensor:
    """By autograd of x times sigmoid(x): its two terms are added up in float32."""
    exact = gate.float()
    return (exact * torch.sigmoid(exact) * up.float()).to(gate.dtype)


def double_precision(gate: Tensor, up: Tensor) -> Tensor:
    exact = gate.double()
    return (exact * torch.sigmoid(exact) * up.double()).to(gate.dtype)
