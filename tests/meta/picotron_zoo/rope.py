"""Right rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def _both(
    turn: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> Pair:
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    return turn(q, cos, sin), turn(k, cos, sin)


def complex_numbers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        turned = torch.complex(first.contiguous(), second.contiguous()) * torch.complex(cos, sin)
        return torch.cat((turned.real, turned.imag), -1).to(x.dtype)

    return _both(turn, q, k, cos.contiguous(), sin.contiguous())


def products_rounded(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        a, b = (first * cos).to(x.dtype), (second * sin).to(x.dtype)
        c, d = (second * cos).to(x.dtype), (first * sin).to(x.dtype)
        return torch.cat((a - b, c + d), -1)

    return _both(turn, q, k, cos, sin)


def tables_rounded(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    return products_rounded(q, k, cos.to(q.dtype), sin.to(q.dtype))


def rotate_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        rotated = torch.cat((-second, first), -1)
        return (x * torch.cat((cos, cos), -1) + rotated * torch.cat((sin, sin), -1)).to(x.dtype)

    return _both(turn, q, k, cos, sin)


def double_precision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    q_out, k_out = rotate_half(q.double(), k.double(), cos.double(), sin.double())
    return q_out.to(q.dtype), k_out.to(k.dtype)
