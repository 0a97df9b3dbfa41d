"""The contract of `rope`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Rope(Protocol):
    """Rotate each pair (x[i], x[i + D/2]) by its position's angle: the rotate-half convention.

    y[:D/2] = x[:D/2] cos - x[D/2:] sin;  y[D/2:] = x[D/2:] cos + x[:D/2] sin.

    Args:
        q: (B, H, T, D), D even.
        k: (B, K, T, D), dtype and device of q.
        cos, sin: (T, D/2) float32, or (B, T, D/2) where positions differ by sequence.

    Returns: (q, k) rotated, same shapes and dtype; new tensors.
    Numerics: at least q's dtype; rounded to it once at the end or at each product.
    Source: Su et al. 2021 (arXiv:2104.09864) eq. 34, in the half-split order of Llama's weights.
    """

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...
