"""What kernels are fed: distributions of values, and ways to lay a tensor out in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Shape = tuple[int, ...]


def normal(shape: Shape, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def shifted(shape: Shape, generator: Generator) -> Tensor:
    """A mean of 3: errors that cancel around zero add up here."""
    return normal(shape, generator) + 3


def outliers(shape: Shape, generator: Generator) -> Tensor:
    """Some channels twenty times as large, as in trained models (arXiv:2208.07339)."""
    x = normal(shape, generator)
    if shape and shape[-1]:
        x[..., :: max(1, shape[-1] // 3)] *= 20
    return x


def tiny(shape: Shape, generator: Generator) -> Tensor:
    return normal(shape, generator) * 1e-4


def large(shape: Shape, generator: Generator) -> Tensor:
    """Its square overflows float16."""
    return normal(shape, generator).clamp(-4, 4) * 500


def low_rank(shape: Shape, generator: Generator) -> Tensor:
    """Like activations: few directions, a sink at the first token, magnitudes over decades."""
    if len(shape) < 2:
        return normal(shape, generator)
    rank = 2
    left = normal((*shape[:-1], rank), generator)
    right = normal((*shape[:-2], rank, shape[-1]), generator)
    x = left @ right + 0.05 * normal(shape, generator)
    if shape[-2]:
        x[..., 0, :] *= 8
    return x


def constant(shape: Shape, generator: Generator) -> Tensor:
    """One number everywhere; not a power of two, so that it rounds."""
    return torch.full(shape, float(normal((1,), generator)), dtype=torch.float64)


def zeros(shape: Shape, generator: Generator) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


DISTRIBUTIONS: dict[str, Callable[[Shape, Generator], Tensor]] = {
    "normal": normal,
    "shifted": shifted,
    "outliers": outliers,
    "tiny": tiny,
    "large": large,
    "low_rank": low_rank,
    "constant": constant,
    "zeros": zeros,
}

# contiguous: a kernel's best day. offset: an odd address. transposed: heads inside rows, as a model
# makes them. sliced: a window of a larger tensor, in every dim. fused: a slice along the heads of a
# transposed tensor, as of one QKV product. strided: every second element. broadcast: stride 0 along
# the first dim of more than one element, so that elements overlap. scalar: stride 0 everywhere.
LAYOUTS = (
    "contiguous",
    "offset",
    "transposed",
    "sliced",
    "fused",
    "strided",
    "broadcast",
    "scalar",
)
# Not drawn at random: the rows of dim 0 lie so far apart that 32 bits cannot count the elements
# between the first and the last. The memory between is never touched, so a CPU never provides it.
FAR = "far"
# Not drawn either: all tensors so laid out share one buffer, as the parts of a fused projection.
PACKED = "packed"
FAR_ELEMENTS = 2**31
GUARD = 64  # elements before and after; a multiple of any vector width keeps "contiguous" aligned


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor inside a larger buffer whose other elements are poison; see `place`.

    before: a copy of the buffer.
    """

    tensor: Tensor
    buffer: Tensor
    before: Tensor
    version: int

    def touched(self) -> str:
        """What was done to it: "" or a description."""
        if self.spilled():
            return "written to outside of its bounds"
        if self._changed().any():
            return "changed"
        same_version = self.tensor._version == self.version
        return "" if same_version else "written to (version counter)"

    def spilled(self) -> bool:
        """Whether anything in the buffer beside the tensor itself was changed."""
        if self.buffer is self.tensor:
            return False
        inside = torch.zeros_like(self.buffer, dtype=torch.bool)
        shape, strides = self.tensor.shape, self.tensor.stride()
        inside.as_strided(shape, strides, self.tensor.storage_offset()).fill_(True)
        return bool((self._changed() & ~inside).any())

    def _changed(self) -> Tensor:
        """By element of the buffer; compared as bits, for NaN is not equal to NaN."""
        after, before = self.buffer.reshape(-1), self.before.reshape(-1)
        differ = after.view(torch.uint8) != before.view(torch.uint8)
        return differ.view(len(after), -1).any(-1)


def place(value: Tensor, dtype: torch.dtype, layout: str, device: torch.device) -> Placed:
    """`value` rounded to dtype, in a poisoned buffer of its own.

    Reading outside of the tensor gives NaN (integers: an index far out of bounds). For "broadcast"
    and "scalar" the value must be constant along the dims of stride 0: see `as_laid_out`.
    """
    value = value.to(dtype)
    if layout == FAR:
        return _place_far(value, device)
    ndim = value.dim()
    steps = [2 if layout == "strided" and d == ndim - 1 else 1 for d in range(ndim)]
    margins = [(0, 0)] * ndim
    if layout == "sliced":
        margins = [(1, 2)] * ndim
    if layout == "fused" and ndim > 1:
        margins[1 if ndim > 2 else -1] = (3, 2)
    order = list(range(ndim))
    if layout in ("transposed", "fused") and ndim > 1:
        a, b = (1, 2) if ndim > 2 else (0, 1)
        order[a], order[b] = b, a
    sizes = [
        1 if _repeats(value.shape, layout, d) else value.shape[d] * steps[d] + sum(margins[d])
        for d in range(ndim)
    ]
    strides = [0] * ndim
    length = 1
    for d in reversed(order):
        strides[d], length = length, length * sizes[d]
    first = GUARD + (layout == "offset") + sum(strides[d] * margins[d][0] for d in range(ndim))
    strides = [
        0 if _repeats(value.shape, layout, d) else strides[d] * steps[d] for d in range(ndim)
    ]
    poison = math.nan if dtype.is_floating_point else -7777
    buffer = torch.full((length + 2 * GUARD + 1,), poison, dtype=dtype, device=device)
    tensor = buffer.as_strided(value.shape, strides, first)
    once = [slice(0, 1) if _repeats(value.shape, layout, d) else slice(None) for d in range(ndim)]
    tensor[tuple(once)].copy_(value[tuple(once)])
    tensor = tensor.detach()
    return Placed(tensor, buffer, buffer.clone(), tensor._version)


def place_together(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Placed]:
    """Tensors of one dtype in one poisoned buffer, side by side along their last dim where they
    are alike in all others, else one behind the other.
    """
    if not values:
        return {}
    first = next(iter(values.values()))
    alike = all(value.shape[:-1] == first.shape[:-1] for value in values.values())
    width = sum(value.shape[-1] for value in values.values())
    rows = first.shape[:-1].numel()
    total = rows * width if alike else sum(value.numel() for value in values.values())
    buffer = torch.full((total + 2 * GUARD,), math.nan, dtype=first.dtype, device=device)
    tensors: dict[str, Tensor] = {}
    start = GUARD
    for name, value in values.items():
        strides = list(torch.empty(value.shape, device="meta").stride())
        if alike:
            strides = [stride // value.shape[-1] * width for stride in strides[:-1]] + [1]
        tensors[name] = buffer.as_strided(value.shape, strides, start).copy_(value).detach()
        start += value.shape[-1] if alike else value.numel()
    before = buffer.clone()
    return {name: Placed(t, buffer, before, t._version) for name, t in tensors.items()}


def _place_far(value: Tensor, device: torch.device) -> Placed:
    """Rows without poison around them: to write it would take the gigabytes in between."""
    rows, width = len(value), value[0].numel()
    step = -(-FAR_ELEMENTS // (rows - 1))
    space = torch.empty((rows - 1) * step + width, dtype=value.dtype, device=device)
    tensor = space.as_strided(value.shape, (step, *value[0].contiguous().stride()))
    tensor.copy_(value)
    return Placed(tensor, tensor, tensor.clone(), tensor._version)


def as_laid_out(value: Tensor, layout: str) -> Tensor:
    """`value` made constant along the dims that `layout` gives stride 0."""
    for d in range(value.dim()):
        if _repeats(value.shape, layout, d):
            value = value.narrow(d, 0, 1).expand(value.shape)
    return value.clone()


def _repeats(shape: Shape, layout: str, dim: int) -> bool:
    if layout == "scalar":
        return shape[dim] > 0
    longer = [d for d, size in enumerate(shape) if size > 1]
    return layout == "broadcast" and bool(longer) and dim == longer[0]
