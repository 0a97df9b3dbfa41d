"""The contract of `loss`: the head and the cross-entropy together."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Loss(Protocol):
    """sum over n with targets[n] != ignore_index of  logsumexp(h_n W^T) - h_n . W[targets[n]].

    It takes the hidden states and the head's weight, so that a backend may never materialise the
    (N, V) logits. It is a *sum*: the engine divides once by the number of valid tokens of the whole
    global batch, so that accumulation, packing and every parallel layout give the same gradient.

    Args:
        hidden: (N, E) float.
        weight: (V, E), dtype and device of hidden.
        targets: (N,) int64 in [0, V), or `ignore_index`.
        ignore_index: the target that counts for nothing.

    Returns: () float32; 0 where no target is valid.
    Numerics: log-softmax and the sum in float32 or better.
    """

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
    ) -> Tensor: ...


IGNORE_INDEX = -100  # transformers' and torch's convention
