"""AdamW over several updates, with the roundings that its contract permits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from picotron_conformance.rounding import EXACT, Rounding
from picotron_core.ops.optimizer import AdamW


def adamw(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Sequence[Tensor],
    schedule: Sequence[tuple[int, AdamW]],
    *,
    at: Rounding = EXACT,
) -> dict[str, Tensor]:
    """update (the last param minus the first), exp_avg, exp_avg_sq after one update per gradient.

    The update and not the parameter is judged: a step of 1e-3 would drown in the parameter.

    schedule: the number and the hyper-parameters of each update.
    """

    @cache  # the same in every update that has it, so that its errors add up over a run
    def scalar(x: float) -> Tensor:
        """A kernel may keep a factor in float32: an error that all elements share."""
        return at.float32(torch.tensor(x, dtype=torch.float64))

    start, param = param.double(), param.double()
    m, v = exp_avg.double(), exp_avg_sq.double()
    for grad, (step, hyper) in zip(grads, schedule, strict=True):
        g = grad.double()
        decayed = at.float32(param * scalar(1 - hyper.lr * hyper.weight_decay), units=2)
        m = at.float32(
            at.float32(scalar(hyper.beta1) * m) + at.float32(scalar(1 - hyper.beta1) * g)
        )
        v = at.float32(
            at.float32(scalar(hyper.beta2) * v)
            + at.float32(scalar(1 - hyper.beta2) * g * g, units=2)
        )
        root = at.float32((v / scalar(1 - hyper.beta2**step)).sqrt(), units=3)
        ratio = at.float32(m / scalar(1 - hyper.beta1**step), units=2) / at.float32(
            root + hyper.eps
        )
        moved = at.float32(scalar(hyper.lr) * at.float32(ratio), units=2)
        param = at.float32(decayed - moved)
    # Of the difference of two float32 numbers, when it is looked at in float32.
    return {"update": at.float32(param - start), "exp_avg": m, "exp_avg_sq": v}
