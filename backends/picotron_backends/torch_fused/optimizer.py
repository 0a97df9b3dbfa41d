"""AdamW by torch's fused kernel: one pass over all parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

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
    if not params:
        return
    # torch counts up one tensor per parameter; the contract's count is the caller's.
    steps = torch.full((len(params),), float(step - 1), device=params[0].device)
    torch_adamw(
        list(params),
        list(grads),
        list(states["exp_avg"]),
        list(states["exp_avg_sq"]),
        [],
        list(steps.unbind()),
        fused=True,
        amsgrad=False,
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        maximize=False,
    )
