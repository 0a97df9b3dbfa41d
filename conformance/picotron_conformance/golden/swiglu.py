"""SwiGLU, with the roundings that its contract permits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from picotron_conformance.rounding import EXACT, TRANSCENDENTAL, Rounding


def swiglu(
    tensors: Mapping[str, Tensor], upstream: Mapping[str, Tensor], *, at: Rounding = EXACT
) -> dict[str, Tensor]:
    """y; with upstream also dgate, dup. tensors: gate and up of one shape."""
    gate, up = tensors["gate"].double(), tensors["up"].double()
    sigmoid = at.wide(torch.sigmoid(gate), units=TRANSCENDENTAL)
    silu = at.stored(at.wide(gate * sigmoid))
    results = {"y": at.stored(silu * up)}
    if not upstream:
        return results

    dy = upstream["y"].double()
    # silu' = sigmoid (1 + gate (1 - sigmoid)), a sum of two terms that cancel where silu turns.
    complement = at.wide(1 - sigmoid)
    slope = at.wide(sigmoid) + at.wide(gate * sigmoid * complement, units=TRANSCENDENTAL)
    dgate = at.stored(at.stored(dy * up) * at.wide(slope))
    dup = at.stored(dy * silu)
    return results | {"dgate": dgate, "dup": dup}
