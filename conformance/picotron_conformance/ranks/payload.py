"""What is sent: integers that tell ranks and places apart, in memory with guarded edges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from picotron_conformance.check import WrongKernelError
from picotron_core.ops.comm import ReduceOp

Shape = tuple[int, ...]

MOST_RANKS = 4
# Values of one place differ by rank and go up to 4 * span: sums of four are exact in the dtype, but
# not in one with fewer bits.
SPANS = {
    torch.bool: 1,
    torch.uint8: 15,
    torch.int32: 99_999_989,
    torch.int64: 2**57 - 1,
    torch.bfloat16: 15,
    torch.float16: 127,
    torch.float32: 2**19 - 1,
    torch.float64: 2**48 - 1,
}
# Powers of two by place, so that a detour through a dtype with fewer exponents is seen as well.
EXPONENTS = {
    torch.bfloat16: (0, 40, -40, 90, -90),
    torch.float16: (0, 4, -6),
    torch.float32: (0, 40, -40, 90, -90),
    torch.float64: (0, 300, -300),
}


def payload(rank: int, shape: Shape, dtype: torch.dtype, *, salt: int = 0) -> Tensor:
    """What `rank` contributes: the same on every machine, so that each rank knows all of them."""
    place = torch.arange(torch.Size(shape).numel()) + 97 * salt
    scrambled = ((place + 1) * 6364136223846793005) >> 6  # wraps around, as hashes do
    value = MOST_RANKS * (scrambled % SPANS[dtype]) + rank % MOST_RANKS + 1
    if dtype == torch.bool:
        return (((scrambled >> 20) + rank) % 2 == 0).view(shape)
    if dtype != torch.uint8:  # places where all are negative, and places of both signs
        value = torch.where((place % 3 == 0) | ((place + rank) % 5 == 1), -value, value)
    if dtype.is_floating_point:
        exponents = torch.tensor(EXPONENTS[dtype])[place % len(EXPONENTS[dtype])]
        return torch.ldexp(value.double(), exponents).to(dtype).view(shape)
    return value.to(dtype).view(shape)


def reduced(values: Iterable[Tensor], op: ReduceOp) -> Tensor:
    """The exact answer."""
    stacked = torch.stack(tuple(values))
    if op == "max":
        return stacked.amax(0)
    if op == "min":
        return stacked.amin(0)
    wide = torch.float64 if stacked.dtype.is_floating_point else torch.int64
    return stacked.to(wide).sum(0).to(stacked.dtype)


@dataclass(frozen=True, slots=True)
class Guarded:
    """A tensor inside a larger buffer, at an odd place."""

    tensor: Tensor
    buffer: Tensor
    before: Tensor  # a copy of the whole buffer
    outside: Tensor  # where the buffer is not the tensor
    address: int

    def check_edges(self, what: str) -> None:
        if not torch.equal(self.buffer[self.outside], self.before[self.outside]):
            raise WrongKernelError(
                f"{what}: memory beside the tensor was written to",
                hint="a strided tensor taken for a dense one, or a size that is rounded up",
            )

    def check_unchanged(self, what: str) -> None:
        if not torch.equal(self.buffer, self.before):
            raise WrongKernelError(
                f"{what}: the input was changed", hint="a reduction in the caller's own memory"
            )

    def check_in_place(self, what: str) -> None:
        if self.tensor.data_ptr() != self.address:
            raise WrongKernelError(
                f"{what}: the tensor has other memory than before the call",
                hint="a result bound to the tensor instead of written to its memory",
            )


def guarded(value: Tensor, device: torch.device, *, layout: str = "dense") -> Guarded:
    """`value` in a buffer of other numbers. Layouts: "dense", "strided" (every second element),
    "transposed" (the first dim fastest).
    """
    strides = list(torch.empty(value.shape, device="meta").stride())
    if layout == "strided":
        strides = [2 * stride for stride in strides]
    if layout == "transposed":
        strides = list(torch.empty(value.shape[::-1], device="meta").stride())[::-1]
    buffer = torch.full((2 * value.numel() + 8,), 77, device=device).to(value.dtype)
    tensor = buffer.as_strided(value.shape, strides, 3)
    tensor.copy_(value)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(value.shape, strides, 3).fill_(False)
    return Guarded(tensor, buffer, buffer.clone(), outside, tensor.data_ptr())
