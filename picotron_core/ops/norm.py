"""The contract of `norm`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RMSNorm(Protocol):
    """y = cast(x / sqrt(mean(x^2, last dim) + eps)) * weight.

    Args:
        x: (..., E), any float dtype.
        weight: (E,), dtype and device of x.
        eps: added to the mean square; > 0.

    Returns: (..., E), dtype of x.
    Numerics: the mean and the division in float32; rounded to x's dtype, then times weight
        (Llama's order).
    Source: Zhang & Sennrich 2019 (arXiv:1910.07467) eq. 4.
    """

    def __call__(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor: ...
