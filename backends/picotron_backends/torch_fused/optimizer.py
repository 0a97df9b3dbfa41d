"""AdamW by torch's fused kernel: one pass over all parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from picotron_core.ops.optimizer import STATES, AdamW


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    *,
    step: int,
    hyper: AdamW,
) -> None:
    """Tensors that are not contiguous are copied there and back."""
    if not params:
        return
    in_place = [params, *(states[name] for name in STATES)]
    # torch's CPU kernel pairs values by their place in memory, whatever the strides say.
    dense_params, dense_avg, dense_avg_sq, dense_grads = (
        [tensor.contiguous() for tensor in tensors] for tensors in (*in_place, grads)
    )
    # It counts up one tensor per parameter; the contract's count is the caller's.
    steps = torch.full((len(params),), float(step - 1), device=params[0].device)
    torch_adamw(
        dense_params,
        dense_grads,
        dense_avg,
        dense_avg_sq,
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
    for tensors, dense in zip(in_place, (dense_params, dense_avg, dense_avg_sq), strict=True):
        for tensor, updated in zip(tensors, dense, strict=True):
            if updated is not tensor:
                tensor.copy_(updated)
