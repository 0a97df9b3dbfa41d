"""Right AdamWs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from picotron_core.ops.optimizer import AdamW

Tensors = Sequence[Tensor]
States = Mapping[str, Tensors]


def _rows(params: Tensors, grads: Tensors, states: States) -> Iterator[tuple[Tensor, ...]]:
    return zip(params, grads, states["exp_avg"], states["exp_avg_sq"], strict=True)


@torch.no_grad()
def lists_at_once(
    params: Tensors, grads: Tensors, states: States, *, step: int, hyper: AdamW
) -> None:
    if not params:
        return
    p, g = list(params), list(grads)
    m, v = list(states["exp_avg"]), list(states["exp_avg_sq"])
    torch._foreach_mul_(p, 1 - hyper.lr * hyper.weight_decay)
    torch._foreach_lerp_(m, g, 1 - hyper.beta1)
    torch._foreach_mul_(v, hyper.beta2)
    torch._foreach_addcmul_(v, g, g, 1 - hyper.beta2)
    length = torch._foreach_sqrt(v)
    torch._foreach_div_(length, math.sqrt(1 - hyper.beta2**step))
    torch._foreach_add_(length, hyper.eps)
    torch._foreach_addcdiv_(p, m, length, -hyper.lr / (1 - hyper.beta1**step))


@torch.no_grad()
def corrections_in_rate(
    params: Tensors, grads: Tensors, states: States, *, step: int, hyper: AdamW
) -> None:
    root = math.sqrt(1 - hyper.beta2**step)
    rate, eps = hyper.lr * root / (1 - hyper.beta1**step), hyper.eps * root
    for p, g, m, v in _rows(params, grads, states):
        m.mul_(hyper.beta1).add_(g, alpha=1 - hyper.beta1)
        v.mul_(hyper.beta2).add_(g.square() * (1 - hyper.beta2))
        p.sub_(hyper.lr * hyper.weight_decay * p).sub_(rate * m / (v.sqrt() + eps))


@torch.no_grad()
def division_into_sum(
    params: Tensors, grads: Tensors, states: States, *, step: int, hyper: AdamW
) -> None:
    rate, root = hyper.lr / (1 - hyper.beta1**step), math.sqrt(1 - hyper.beta2**step)
    for p, g, m, v in _rows(params, grads, states):
        m.copy_(hyper.beta1 * m + (1 - hyper.beta1) * g)
        v.copy_(hyper.beta2 * v + (1 - hyper.beta2) * g * g)
        p.mul_(1 - hyper.lr * hyper.weight_decay)
        p.addcdiv_(m, (v.sqrt() / root).add_(hyper.eps), value=-rate)


@torch.no_grad()
def interpolated(
    params: Tensors, grads: Tensors, states: States, *, step: int, hyper: AdamW
) -> None:
    for p, g, m, v in _rows(params, grads, states):
        m.lerp_(g, 1 - hyper.beta1)
        v.lerp_(g.square(), 1 - hyper.beta2)
        one, two = 1 - hyper.beta1**step, 1 - hyper.beta2**step
        direction = (m / one) / ((v / two).sqrt() + hyper.eps)
        p.sub_(hyper.lr * (direction + hyper.weight_decay * p))


@torch.no_grad()
def one_flat_buffer(
    params: Tensors, grads: Tensors, states: States, *, step: int, hyper: AdamW
) -> None:
    lists = (params, grads, states["exp_avg"], states["exp_avg_sq"])
    if not params:
        return
    p, g, m, v = (torch.cat([x.reshape(-1) for x in tensors]) for tensors in lists)
    flat = {"exp_avg": [m], "exp_avg_sq": [v]}
    division_into_sum([p], [g], flat, step=step, hyper=hyper)
    sizes = [x.numel() for x in params]
    for tensors, updated in zip((lists[0], *lists[2:]), (p, m, v), strict=True):
        for tensor, part in zip(tensors, updated.split(sizes), strict=True):
            tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def double_precision(
    params: Tensors, grads: Tensors, states: States, *, step: int, hyper: AdamW
) -> None:
    for p, g, m, v in _rows(params, grads, states):
        exact = [x.double() for x in (p, m, v)]
        moments = {"exp_avg": [exact[1]], "exp_avg_sq": [exact[2]]}
        interpolated([exact[0]], [g.double()], moments, step=step, hyper=hyper)
        for tensor, value in zip((p, m, v), exact, strict=True):
            tensor.copy_(value)
