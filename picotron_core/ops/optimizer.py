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

    What depends on `hyper` and t alone (1 - beta, 1 - beta^t, 1 - lr * weight_decay) is computed in
    Python floats, which are float64, and then rounded to float32 if it must be: in float32,
    1 - 0.999 is wrong from its fifth digit on, and 1 - 0.9999^t loses as much.

    A NaN or an infinity shows in what is computed of it, and nowhere else: nothing is clipped or
    skipped.

    Args:
        params: float32 tensors, updated in place. Any sequence, a tuple as well; the tensors may
            be views of one buffer, if they do not overlap.
        grads: float32, same shapes; not changed.
        states: `STATES` -> one tensor per parameter, updated in place. Any mapping, in any order.
        step: t, 1 at the first update. The caller's: it may jump, as when a checkpoint is loaded.
        hyper: see `AdamW`. All of it may change from one update to the next.

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
