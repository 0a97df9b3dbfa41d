"""The contract of `swiglu`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SwiGLU(Protocol):
    """y = silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    Args:
        gate, up: same shape, dtype and device.

    Returns: the same shape and dtype; a new tensor.
    Source: Shazeer 2020 (arXiv:2002.05202) eq. 6.
    """

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...
