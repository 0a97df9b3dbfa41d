"""AdamW over several updates, with the roundings that its contract permits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from picotron_conformance.rounding import EXACT, Rounding
from picotron_core.ops.optimizer import AdamW


def adamw(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Sequence[Tensor],
    *,
    first_step: int,
    hyper: AdamW,
    at: Rounding = EXACT,
) -> dict[str, Tensor]:
    """update (the last param minus the first), exp_avg, exp_avg_sq after one update per gradient.

    The update and not the parameter is judged: a step of 1e-3 would drown in the parameter.
    """

    def scalar(x: float) -> Tensor:
        """A kernel may keep a factor in float32: an error that all elements share."""
        return at.float32(torch.tensor(x, dtype=torch.float64))

    # The same in every update, so their errors add up over a run.
    keep, lr = scalar(1 - hyper.lr * hyper.weight_decay), scalar(hyper.lr)
    beta1, rest1 = scalar(hyper.beta1), scalar(1 - hyper.beta1)
    beta2, rest2 = scalar(hyper.beta2), scalar(1 - hyper.beta2)
    start, param = param.double(), param.double()
    m, v = exp_avg.double(), exp_avg_sq.double()
    for step, grad in enumerate(grads, start=first_step):
        g = grad.double()
        decayed = at.float32(param * keep, units=2)
        m = at.float32(at.float32(beta1 * m) + at.float32(rest1 * g))
        v = at.float32(at.float32(beta2 * v) + at.float32(rest2 * g * g, units=2))
        root = at.float32((v / scalar(1 - hyper.beta2**step)).sqrt(), units=3)
        ratio = at.float32(m / scalar(1 - hyper.beta1**step), units=2) / at.float32(
            root + hyper.eps
        )
        param = at.float32(decayed - at.float32(lr * at.float32(ratio), units=2))
    # Of the difference of two float32 numbers, when it is looked at in float32.
    return {"update": at.float32(param - start), "exp_avg": m, "exp_avg_sq": v}
