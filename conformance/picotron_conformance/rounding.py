"""Where a right kernel may round, and how far that can move its results: Monte-Carlo arithmetic.

A golden computation (`golden/`) is written in float64 and passes every value that a real kernel
would round through a `Rounding`. `EXACT` changes nothing, and gives the golden result. `Random`
rounds each such value at random; the spread of the results over some runs is the noise scale by
which an error is judged. So nobody derives an error bound by hand, and
cancellation, outliers and ill-conditioned inputs are in it.

Source: Parker, Monte Carlo arithmetic, 1997; Demmel & Nguyen 2013 on sums in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Unit roundoff: half the distance from 1 to the next number.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TF32_BITS = 11
ALIKE = 4093  # draws for a whole tensor, shared by elements whose first ten bits are equal
# The rounding of a logit from which on its exponential has tails that no few runs show.
COARSE = 0.25
# exp, log, rsqrt of fast libraries err by about two units in the last place: four roundoffs.
TRANSCENDENTAL = 4.0


class Rounding:
    """Exact: every mark in a golden computation hands its value through."""

    def stored(self, x: Tensor) -> Tensor:
        """A value kept or multiplied in the dtype of the inputs."""
        return x

    def wide(self, x: Tensor, *, units: float = 1.0) -> Tensor:
        """An intermediate that the contract wants in float32; tier B may keep it as `stored`."""
        return x

    def float32(self, x: Tensor, *, units: float = 1.0) -> Tensor:
        """A value in float32 in every tier: statistics, sums, moments."""
        return x

    def shift(self, top: Tensor) -> Tensor:
        """A softmax's largest logit; NaN where its rounding leaves nothing of the exponentials."""
        return top

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, accumulated in float32 in any order."""
        return a @ b

    def sum(self, x: Tensor, dim: int | tuple[int, ...], *, keepdim: bool = False) -> Tensor:
        """A sum in float32 in any order."""
        return x.sum(dim, keepdim=keepdim)


EXACT = Rounding()


@dataclass(frozen=True, slots=True)
class Random(Rounding):
    """Each mark rounded on a grid that is shifted at random.

    Values are rounded after a random factor, not disturbed one by one: what is equal rounds alike,
    as in a real kernel. With independent errors, constant inputs would accuse right kernels.
    """

    dtype: torch.dtype  # of the kernel's inputs
    tier: str
    generator: torch.Generator

    def stored(self, x: Tensor) -> Tensor:
        return self._rounded(x, self.dtype)

    def wide(self, x: Tensor, *, units: float = 1.0) -> Tensor:
        return self.stored(x) if self.tier == "B" else self.float32(x, units=units)

    def float32(self, x: Tensor, *, units: float = 1.0) -> Tensor:
        rounded = self._rounded(x, torch.float32)
        return rounded if units == 1.0 else torch.where(x.isfinite(), x + (rounded - x) * units, x)

    def shift(self, top: Tensor) -> Tensor:
        if self.tier == "A":
            return top
        unit = max(UNIT[self.dtype], 2.0**-TF32_BITS)
        return top.masked_fill(top.abs() * unit > COARSE, torch.nan)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        if self.tier == "B" and self.dtype == torch.float32:
            a, b = self._tf32(a), self._tf32(b)
        product = a @ b
        length = a.square() @ b.square()
        unit = UNIT[torch.float32] * max(1, a.shape[-1]) ** 0.5
        return self._summed(product, length, unit)

    def sum(self, x: Tensor, dim: int | tuple[int, ...], *, keepdim: bool = False) -> Tensor:
        total = x.sum(dim, keepdim=keepdim)
        terms = max(1, x.numel() // max(1, total.numel()))
        length = x.square().sum(dim, keepdim=keepdim)
        return self._summed(total, length, UNIT[torch.float32] * terms**0.5)

    def _summed(self, total: Tensor, length: Tensor, unit: float) -> Tensor:
        """Each of n additions rounds a partial sum; one after the other, these grow up to `total`,
        and wander as far as the square root of `length`, the sum of the squared terms.
        """
        size = (total.square() + length).sqrt() * unit
        return total + size.nan_to_num(0, 0, 0) * self._alike(total)

    def _rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        factor = 2.0 ** -torch.rand((), generator=self.generator, dtype=torch.float64)
        rounded = (x * factor).to(dtype).double() / factor
        if dtype != torch.float16:  # nothing that is asked comes near the ends of the others
            return rounded
        # Below its normal numbers the grid is coarse, and few runs show it.
        tiny = torch.full_like(x, 2.0**-25).where((x != 0) & (x.abs() < 2.0**-14), 0.0)
        rounded = rounded + self._noise(tiny)
        # Where the grid's end is passed: a kernel that keeps the value must have room for it.
        return torch.where(rounded.isinf() & x.isfinite(), x, rounded)

    def _tf32(self, x: Tensor) -> Tensor:
        """Operands as tensor cores take them: eleven bits, the range of float32."""
        factor = 2.0 ** -torch.rand((), generator=self.generator, dtype=torch.float64)
        mantissa, exponent = torch.frexp(x * factor)
        rounded = torch.ldexp((mantissa * 2**TF32_BITS).round() / 2**TF32_BITS, exponent) / factor
        return torch.where(x.isfinite(), rounded, x)

    def _alike(self, x: Tensor) -> Tensor:
        """Uniform in [-1, 1], and the same where x is nearly the same: equal sums err alike."""
        table = 2 * torch.rand(ALIKE, generator=self.generator, dtype=torch.float64) - 1
        mantissa, exponent = torch.frexp(x.nan_to_num(0, 0, 0))
        place = (mantissa * 2**10).round().long() * 2654435761 + exponent * 40503
        return table[place % ALIKE]

    def _noise(self, size: Tensor) -> Tensor:
        draw = torch.rand(size.shape, generator=self.generator, dtype=torch.float64)
        return size.nan_to_num(0, 0, 0) * (2 * draw - 1)
