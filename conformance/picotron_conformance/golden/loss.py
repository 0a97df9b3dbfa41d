"""Head and cross-entropy, with the roundings that their contract permits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from picotron_conformance.rounding import EXACT, TRANSCENDENTAL, Rounding


def loss(
    tensors: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    *,
    ignore_index: int,
    at: Rounding = EXACT,
) -> dict[str, Tensor]:
    """loss; with upstream also dhidden, dweight.

    tensors: hidden (N, E), weight (V, E), targets (N,).
    """
    hidden, weight, targets = (
        tensors["hidden"].double(),
        tensors["weight"].double(),
        tensors["targets"],
    )
    counted = (targets != ignore_index).nonzero().squeeze(-1)
    rows, labels = hidden[counted], targets[counted]

    logits = at.stored(at.matmul(rows, weight.T))
    top = logits.amax(-1, keepdim=True) if len(counted) else logits[:, :1]
    exponentials = at.float32((logits - top).exp(), units=TRANSCENDENTAL)
    total = at.sum(exponentials, -1, keepdim=True)
    lse = at.wide(at.float32(total.log(), units=TRANSCENDENTAL) + top)
    picked = logits.gather(-1, labels[:, None])
    results = {"loss": at.float32(at.sum(at.wide(lse - picked).squeeze(-1), 0))}
    if not upstream:
        return results

    dloss = upstream["loss"].double()
    onehot = torch.zeros_like(logits).scatter_(-1, labels[:, None], 1.0)
    # exp(logit - lse) of the rounded lse errs by as much as a large lse does.
    p = at.float32((logits - at.float32(lse)).exp(), units=TRANSCENDENTAL)
    wide = at.wide(p - onehot)
    # A store may hide how that errs, and is not done by all kernels: so both are in.
    slip = wide - (logits.softmax(-1) - onehot)
    # The upstream scalar may come in before or after the store, or after the products.
    dlogits = at.stored(at.stored(wide) * dloss) + slip * dloss
    dhidden = torch.zeros_like(hidden)
    dhidden[counted] = at.stored(at.stored(at.matmul(dlogits, weight)))
    dweight = at.stored(at.stored(at.matmul(dlogits.T, rows)))
    return results | {"dhidden": dhidden, "dweight": dweight}
