"""Rotary position embedding, with the roundings that its contract permits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from picotron_conformance.rounding import EXACT, Rounding


def rope(
    tensors: Mapping[str, Tensor], upstream: Mapping[str, Tensor], *, at: Rounding = EXACT
) -> dict[str, Tensor]:
    """q_out, k_out; with upstream also dq, dk: the same turn the other way.

    tensors: q (B, H, T, D), k (B, K, T, D), cos and sin (T, D/2) or (B, T, D/2).
    """
    cos, sin = tensors["cos"].double(), tensors["sin"].double()
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]

    def turned(x: Tensor, sign: int) -> Tensor:
        x = x.double()
        real, imaginary = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        # The tables may be rounded to x's dtype, and each product, and their sum.
        c, s = at.stored(cos.expand_as(real)), at.stored(sign * sin.expand_as(real))
        return torch.cat(
            (
                at.stored(at.stored(real * c) - at.stored(imaginary * s)),
                at.stored(at.stored(imaginary * c) + at.stored(real * s)),
            ),
            dim=-1,
        )

    results = {"q_out": turned(tensors["q"], 1), "k_out": turned(tensors["k"], 1)}
    for name in "qk":
        if f"{name}_out" in upstream:
            results[f"d{name}"] = turned(upstream[f"{name}_out"], -1)
        elif upstream:
            results[f"d{name}"] = torch.zeros(tensors[name].shape, dtype=torch.float64)
    return results
