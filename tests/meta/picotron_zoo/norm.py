"""Right RMS norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


def _blocks_mean_square(x: Tensor) -> Tensor:
    blocks = [block.square().sum(-1, keepdim=True) for block in x.split(32, -1)]
    return torch.cat(blocks, -1).sum(-1, keepdim=True) / x.shape[-1]


class _ByHand(torch.autograd.Function):
    """Keeps x and 1 / root; sums over rows in blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        power: Callable[[Tensor], Tensor],
        kept: torch.dtype,
    ) -> Tensor:
        r = torch.rsqrt(power(x.float()) + eps).to(kept).float()
        ctx.save_for_backward(x, weight, r)
        return (x.float() * r).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        normed = x.float() * r
        dnormed = dy.float() * weight.float()
        dx = r * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
        rows = (dy.float() * normed.to(x.dtype).float()).reshape(-1, x.shape[-1])
        parts = [block.sum(0) for block in rows.split(32)] if len(rows) else [rows.sum(0)]
        return dx.to(x.dtype), torch.stack(parts).sum(0).to(weight.dtype), None, None, None


def two_sums(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y: Tensor = _ByHand.apply(x, weight, eps, _blocks_mean_square, torch.float32)
    return y


def rows_in_blocks(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y: Tensor = _ByHand.apply(x, weight, eps, _mean_square, torch.float32)
    return y


def rounded_once(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    exact = x.float()
    return (exact * torch.rsqrt(_mean_square(exact) + eps) * weight.float()).to(x.dtype)


class _KeepsNormed(torch.autograd.Function):
    """Keeps the normed x, in float32, instead of x: dx is made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.rsqrt(_mean_square(x.float()) + eps)
        normed = x.float() * r
        ctx.save_for_backward(normed, weight, r)
        return normed.to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, r = ctx.saved_tensors
        dnormed = (dy * weight).float()
        along = (dnormed * normed).mean(-1, keepdim=True)
        dx = (dnormed - normed * along) * r
        dweight = (dy * normed.to(dy.dtype)).reshape(-1, normed.shape[-1]).float().sum(0)
        return dx.to(dy.dtype), dweight.to(weight.dtype), None


def closed_form(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y: Tensor = _KeepsNormed.apply(x, weight, eps)
    return y


def root_and_division(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    exact = x.float()
    return (exact / (_mean_square(exact) + eps).sqrt()).to(x.dtype) * weight


def double_precision(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    exact = x.double()
    r = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * r * weight.double()).to(x.dtype)


def root_in_16_bits(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y: Tensor = _ByHand.apply(x, weight, eps, _mean_square, x.dtype)
    return y
