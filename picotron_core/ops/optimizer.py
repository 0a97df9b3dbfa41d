"""The contract of `optimizer`: one AdamW update, in place, over lists of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# The state's names are the contract's, so a checkpoint written under one backend resumes under
# another. Each holds one float32 tensor of the parameter's shape, zero before the first step.
STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Hyper-parameters of one update. `weight_decay` is decoupled and multiplied by `lr`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Optimizer(Protocol):
    """Loshchilov & Hutter's AdamW, each parameter p with gradient g at update number t >= 1:

        p <- p - lr * weight_decay * p
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: float32 tensors, updated in place.
        grads: float32, same shapes; not changed.
        states: `STATES` -> one tensor per parameter, updated in place.
        step: t, 1 at the first update.
        hyper: see `AdamW`.

    Source: arXiv:1711.05101 algorithm 2 (with the schedule multiplier inside lr).
    """

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        *,
        step: int,
        hyper: AdamW,
    ) -> None: ...
