"""Tensor parallelism: every rank of the tp axis has a slice of each matrix.

    x (B, T, E), whole ->|enter|-> q, k, v of some heads -> attention -> their part of o ->|leave|->
    x (B, T, E), whole ->|enter|-> some columns of gate and up -> swiglu -> part of down ->|leave|->

Between `enter` and `leave` each rank computes with its own heads, or its own columns, and nobody
waits: the first product is cut by its outputs, the second by its inputs, so that the parts of the
result only need to be added (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

With `sequence` the norms and the residual stream between the blocks are divided as well, by tokens:
the all_reduce at the block's end becomes a reduce_scatter there and an all_gather at the next one's
beginning, as many bytes, and a rank keeps 1/tp of what lies between the blocks. What enters one is
whole, and kept whole for the backward (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from picotron_core.errors import ConfigError
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import put
from picotron_core.model.llama import Llama
from picotron_core.parallel.mesh import Axis
from picotron_core.parallel.vocabulary import parallel_embedding, parallel_loss

Region = Callable[[Tensor], Tensor]
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # cut by outputs: rows of (out, in)
ROW = ("o_proj", "down_proj")  # cut by inputs
VOCABULARY = ("embed_tokens", "lm_head")  # cut by tokens of the vocabulary, padded


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a parameter is cut over an axis: along `dim`, into as many equal parts as it has ranks.

    size: of the whole along `dim`; the last part is filled up with zeros.
    """

    dim: int
    size: int
    axis: Axis

    @property
    def part_size(self) -> int:
        return -(-self.size // self.axis.size)

    @property
    def bounds(self) -> tuple[int, int]:
        """Where this rank's part begins and ends in the whole."""
        start = min(self.size, self.axis.index * self.part_size)
        return start, min(self.size, start + self.part_size)

    def part_shape(self, whole: torch.Size) -> torch.Size:
        return torch.Size([*whole[: self.dim], self.part_size, *whole[self.dim + 1 :]])

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole: a copy."""
        start, stop = self.bounds
        mine = whole.narrow(self.dim, start, stop - start)
        padded = whole.new_zeros(self.part_shape(whole.shape))
        padded.narrow(self.dim, 0, stop - start).copy_(mine)
        return padded


def refuse_tensor_parallel(architecture: Architecture, degree: int) -> None:
    """Raises: ConfigError where heads or columns cannot be divided; it says which degrees fit."""
    a = architecture
    sizes = {
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "intermediate_size": a.intermediate_size,
    }
    common = gcd(*sizes.values())
    if common % degree:
        odd = ", ".join(f"{name} = {size}" for name, size in sizes.items() if size % degree)
        fitting = [d for d in range(1, common + 1) if common % d == 0]
        raise ConfigError(
            f"parallel.tp = {degree} does not divide the model's {odd}. "
            f"Use --parallel.tp {' or '.join(map(str, fitting))}."
        )


def slice_of(architecture: Architecture, degree: int) -> Architecture:
    """The architecture of one rank's part: what its kernels meet."""
    a = architecture
    return replace(
        a,
        num_attention_heads=a.num_attention_heads // degree,
        num_key_value_heads=a.num_key_value_heads // degree,
        intermediate_size=a.intermediate_size // degree,
        vocab_size=-(-a.vocab_size // degree),
    )


def cuts_of(model: Llama, tp: Axis) -> dict[str, Cut]:
    """Parameter -> how it is cut; whatever is missing is whole on every rank. `model` is uncut."""
    cuts = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[-2]
        if layer in (*COLUMN, *VOCABULARY):
            cuts[name] = Cut(dim=0, size=parameter.shape[0], axis=tp)
        elif layer in ROW:
            cuts[name] = Cut(dim=1, size=parameter.shape[1], axis=tp)
    return cuts if tp.size > 1 else {}


def cut_matrices(model: Llama, cuts: Mapping[str, Cut]) -> None:
    """Give the parameters the shapes of this rank's parts, and no values yet.

    Args:
        cuts: of the whole model; a pipeline stage has some of it.
    """
    shapes = {n: cuts[n].part_shape(p.shape) for n, p in model.named_parameters() if n in cuts}
    put(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def divide(model: Llama, tp: Axis, *, sequence: bool) -> None:
    """Put the regions around the blocks of a model whose matrices are cut."""
    enter: Region = _Enter(tp, sequence)
    leave: Region = _Leave(tp, sequence)
    for number in model.model.layers:
        for name in ("self_attn", "mlp"):
            block = model.get_submodule(f"model.layers.{number}.{name}")
            block.register_forward_pre_hook(lambda _, x: (enter(x[0]), *x[1:]))
            block.register_forward_hook(lambda _, __, out: leave(out))
    embedding = parallel_embedding(tp)
    model.model.embed = lambda ids, weight: leave(embedding(ids, weight))
    if hasattr(model, "lm_head"):
        model.model.norm.register_forward_hook(lambda _, __, out: enter(out))
    model.loss_of = parallel_loss(tp, model.architecture.vocab_size)


def whole_of(model: nn.Module) -> list[str]:
    """The norms, which are whole on every rank; with `sequence` each saw only its own tokens."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 1]


@dataclass(frozen=True, slots=True)
class _Enter:
    """Into a region where ranks do different things with the same tokens."""

    tp: Axis
    sequence: bool

    def __call__(self, x: Tensor) -> Tensor:
        function = GatherTokens if self.sequence else Copy
        out: Tensor = function.apply(x, self.tp)  # type: ignore[no-untyped-call]
        return out


@dataclass(frozen=True, slots=True)
class _Leave:
    """Out of it: each rank has a part of the sum."""

    tp: Axis
    sequence: bool

    def __call__(self, x: Tensor) -> Tensor:
        function = ScatterTokens if self.sequence else Sum
        out: Tensor = function.apply(x, self.tp)  # type: ignore[no-untyped-call]
        return out


class Copy(torch.autograd.Function):
    """Forward: identity; backward: all_reduce over tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return _summed(dout, ctx.tp), None


class Sum(torch.autograd.Function):
    """Forward: all_reduce over tp; backward: identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        return _summed(x, tp)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return dout, None


class GatherTokens(torch.autograd.Function):
    """Forward: all_gather over tp, (B, T/tp, E) -> (B, T, E); backward: reduce_scatter over tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return _gathered(x, tp)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return _scattered(dout, ctx.tp), None


class ScatterTokens(torch.autograd.Function):
    """Forward: reduce_scatter over tp, (B, T, E) -> (B, T/tp, E); backward: all_gather over tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return _scattered(x, tp)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return _gathered(dout, ctx.tp), None


def _summed(x: Tensor, tp: Axis) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # the caller's is not ours to change
    tp.all_reduce(total)
    return total


def _gathered(x: Tensor, tp: Axis) -> Tensor:
    B, T, E = x.shape
    parts = x.new_empty(tp.size * B, T, E)
    tp.all_gather(parts, x.contiguous())
    return parts.view(tp.size, B, T, E).transpose(0, 1).reshape(B, tp.size * T, E)


def _scattered(x: Tensor, tp: Axis) -> Tensor:
    B, T, E = x.shape
    parts = x.view(B, tp.size, T // tp.size, E).transpose(0, 1).contiguous()
    mine = x.new_empty(B, T // tp.size, E)
    tp.reduce_scatter(mine, parts.view(tp.size * B, T // tp.size, E))
    return mine
