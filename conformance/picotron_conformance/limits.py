"""How far from the golden result is too far: one table, in units of the noise scale.

The noise scale of an element is its standard deviation over `DRAWS` runs of Monte-Carlo arithmetic
(see `rounding`), not less than `ROW_SHARE` of its row's root mean square, for a single element's
spread is badly known from so few runs.
"""

from __future__ import annotations

from dataclasses import dataclass

DRAWS = 12
ROW_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Limit:
    value: float
    why: str


LIMITS = {
    "element": Limit(
        16.0,
        "a deviation known from twelve runs has the tails of Student's t with twelve degrees: "
        "of a hundred million in right kernels one was at 10.1. A wrong one errs by hundreds",
    ),
    "row": Limit(
        9.0,
        "root mean square over the last dim, which one cause may move as a whole: of four million "
        "rows of right kernels one was at 6.8",
    ),
    "tensor": Limit(
        1.5, "root mean square of all; 1.0 in right kernels: a little wrong everywhere is seen here"
    ),
    "few": Limit(
        8.0, "added to `tensor`, over the square root of the distinct values: one has no average"
    ),
    "shared": Limit(
        1.4,
        "times the square of the widest run's, if that is more than `tensor`: where all elements "
        "share a few causes nothing averages, and twelve runs know little of it",
    ),
    "tier_b": Limit(
        1.5, "times every limit in tier B, whose few coarse roundings average less; 1.14 was seen"
    ),
    "bias": Limit(
        0.3,
        "of a roundoff, as a factor on the whole: truncation has 0.7; nearest rounding of a row of "
        "16-bit numbers times one number was seen to have 0.21",
    ),
    "bias_float32": Limit(
        8.0, "of float32's roundoff: fast exp and rsqrt err alike for all elements"
    ),
    "bias_noise": Limit(
        9.0, "times the spread of that factor over the runs, which twelve know as badly as a row's"
    ),
    "exact_float32": Limit(
        4.0, "units in the last place of an exact probe in float32; 16 bits must match bitwise"
    ),
}
