"""AdamW as its equations are written, one parameter after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from picotron_core.ops.optimizer import AdamW


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    *,
    step: int,
    hyper: AdamW,
) -> None:
    correction1 = 1 - hyper.beta1**step
    correction2 = 1 - hyper.beta2**step
    for p, g, m, v in zip(params, grads, states["exp_avg"], states["exp_avg_sq"], strict=True):
        p.mul_(1 - hyper.lr * hyper.weight_decay)
        m.mul_(hyper.beta1).add_(g, alpha=1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        p.sub_(hyper.lr * (m / correction1) / ((v / correction2).sqrt() + hyper.eps))
