"""Dynamic loss scaling: float16's gradients, lifted out of the numbers that it cannot hold.

Micikevicius et al. 2018 (arXiv:1710.03740) section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """The scale, and what it has seen. A new one for every step; a checkpoint holds it.

    value: the factor on the loss, as if it were the mean over the tokens of the global batch.
    tokens: of a full global batch. The engine's losses are sums, so it divides by as many; the
        scale then means the same whatever the batch, the accumulation and the number of ranks.
    growth: updates without an overflow after which the value doubles.
    steps: updates made since it last changed.
    skips: overflows in a row.
    """

    value: float
    tokens: int
    growth: int
    steps: int = 0
    skips: int = 0

    @property
    def factor(self) -> float:
        """What a sum of losses is multiplied by: a power of two, which rounds nothing."""
        return float(2.0 ** round(math.log2(self.value / self.tokens)))

    def after_update(self) -> LossScale:
        """No gradient overflowed."""
        if self.steps + 1 < self.growth:
            return replace(self, steps=self.steps + 1, skips=0)
        return replace(self, value=self.value * 2, steps=0, skips=0)

    def after_overflow(self) -> LossScale:
        """A gradient of some rank overflowed: the update was not made."""
        return replace(self, value=self.value / 2, steps=0, skips=self.skips + 1)
