"""RMS norm, with the roundings that its contract permits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from picotron_conformance.rounding import EXACT, TRANSCENDENTAL, Rounding


def rms_norm(
    tensors: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    *,
    eps: float,
    at: Rounding = EXACT,
) -> dict[str, Tensor]:
    """y; with upstream also dx, dweight. tensors: x (..., E), weight (E,)."""
    x, weight = tensors["x"].double(), tensors["weight"].double()
    E = x.shape[-1]
    power = at.wide(at.sum(x * x, -1, keepdim=True) / E)
    r = at.wide((power + eps).rsqrt(), units=TRANSCENDENTAL)
    normed = at.stored(at.wide(x * r))
    results = {"y": at.stored(normed * weight)}
    if not upstream:
        return results

    # dy may be multiplied by the weight, and normed by dy, in the inputs' dtype.
    dy = upstream["y"].double()
    dnormed = at.stored(dy * weight)
    along = at.wide(at.sum(dnormed * x, -1, keepdim=True) * r**3 / E, units=TRANSCENDENTAL)
    dx = at.stored(at.wide(at.wide(dnormed * r, units=2) - at.wide(x * along, units=2)))
    rows = at.stored(dy * normed)
    dweight = at.stored(at.sum(rows.reshape(-1, E), 0))
    return results | {"dx": dx, "dweight": dweight}
