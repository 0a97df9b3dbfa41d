"""Wrong SwiGLUs. Each is the right one of `Gated` with one thing wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picotron_mutants.memory import (
    as_if_dense,
    as_if_rows_dense,
    as_if_rows_joined,
    instance,
    narrow,
    truncated,
)


class Gated:
    """Right: silu(gate) up in float32, rounded once; the backward makes silu again."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        y: Tensor = _Function.apply(gate, up, self)
        return y

    def load(self, x: Tensor) -> Tensor:
        return x.float()

    def sigmoid(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.sigmoid(gate)

    def silu(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return gate * self.sigmoid(gate, dtype)

    def slope(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        s = self.sigmoid(gate, dtype)
        return s * (1 + gate * (1 - s))

    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        dtype = gate.dtype
        return self.store(self.silu(self.load(gate), dtype) * self.load(up), dtype)

    def upstream(self, dy: Tensor) -> Tensor:
        return dy.float()

    def backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        dtype, dy = gate.dtype, self.upstream(dy)
        gate, up = self.load(gate), self.load(up)
        dgate = self.store(dy * up * self.slope(gate, dtype), dtype)
        return dgate, self.store(dy * self.silu(gate, dtype), dtype)

    def saved(self, ctx: Any, gate: Tensor, up: Tensor) -> None:
        ctx.save_for_backward(gate, up)

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return self.backward(*ctx.saved_tensors, dy)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernel: Gated) -> Tensor:
        kernel.saved(ctx, gate, up)
        ctx.kernel = kernel
        return kernel.forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernel.differentiate(ctx, dy), None)


right = Gated()


@instance
class gelu(Gated):
    def sigmoid(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return 0.5 * (1 + torch.erf(gate / math.sqrt(2)))


@instance
class quick_gelu(Gated):
    def sigmoid(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.sigmoid(1.702 * gate)


@instance
class hard_swish(Gated):
    def sigmoid(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return (gate / 6 + 0.5).clamp(0, 1)


@instance
class sigmoid_alone(Gated):
    def silu(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return self.sigmoid(gate, dtype)


@instance
class gate_and_up_swapped(Gated):
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().__call__(up, gate)


@instance
class exp_overflows(Gated):
    """exp(x) / (1 + exp(x)) is inf / inf from 89 on."""

    def sigmoid(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return gate.exp() / (1 + gate.exp())


@instance
class exp_overflows_float16(Gated):
    """exp(-x) in float16 is infinite below -11: the product is 0, though silu(-12) is not."""

    def sigmoid(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype != torch.float16:
            return super().sigmoid(gate, dtype)
        return 1 / (1 + (-gate).exp().half().float())


@instance
class gate_clamped(Gated):
    def load(self, x: Tensor) -> Tensor:
        return super().load(x).clamp(-80, 80)


@instance
class negative_gates_dropped(Gated):
    """silu is 0 below -8, nearly."""

    def silu(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return super().silu(gate, dtype).masked_fill(gate < -7, 0)


@instance
class coarse_sigmoid(Gated):
    """By tanh of ten bits, as the hardware's fast one."""

    def sigmoid(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float32:
            return (0.5 * (1 + torch.tanh(gate / 2))).half().float()
        return (0.5 * (1 + torch.tanh(gate / 2)).half().float()).half().float()


@instance
class sigmoid_in_16_bits(Gated):
    """What tier B may do, claimed as tier A."""

    def sigmoid(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return narrow(super().sigmoid(gate, dtype), dtype)


@instance
class truncating_store(Gated):
    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return truncated(x, dtype)


@instance
class returns_float32(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().forward(gate, up).float()


@instance
class tail_dropped(Gated):
    """Elements after the last whole block of 32 are zeros."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        y = super().forward(gate, up).contiguous()
        y.view(-1)[y.numel() // 32 * 32 :] = 0
        return y


@instance
class beyond_8192_dropped(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        y = super().forward(gate, up).contiguous()
        y.view(-1)[8192:] = 0
        return y


@instance
class rows_need_two_dims(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        rows, width = gate.shape[:-1].numel(), gate.shape[-2:][1]
        return super().forward(gate, up).view(rows, width).view(gate.shape)


@instance
class nothing_to_do_fails(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        assert gate.numel() > 0, "invalid grid: 0 blocks"
        return super().forward(gate, up)


@instance
class dense_inputs_assumed(Gated):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_dense(x))


@instance
class dense_rows_assumed(Gated):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_rows_dense(x))


@instance
class joined_rows_assumed(Gated):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_rows_joined(x))


@instance
class up_read_with_strides_of_gate(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        size = up.untyped_storage().nbytes() // up.element_size()
        reach = sum((n - 1) * s for n, s in zip(up.shape, gate.stride(), strict=True))
        inside = up.storage_offset() + reach < size
        return super().forward(gate, up.as_strided(up.shape, gate.stride()) if inside else up)


@instance
class up_overwritten(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        y = super().forward(gate, up)
        up.copy_(y)
        return y


@instance
class slope_without_second_term(Gated):
    def slope(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return self.sigmoid(gate, dtype)


@instance
class slope_of_sigmoid(Gated):
    def slope(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        s = self.sigmoid(gate, dtype)
        return gate * s * (1 - s)


@instance
class dgate_without_up(Gated):
    def backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, dup = super().backward(gate, up, dy)
        return super().backward(gate, torch.ones_like(up), dy)[0], dup


@instance
class dup_of_gate(Gated):
    def backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        return super().backward(gate, up, dy)[0], dy * gate


@instance
class gradients_swapped(Gated):
    def backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(reversed(super().backward(gate, up, dy)))


@instance
class dup_missing(Gated):
    def backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        return super().backward(gate, up, dy)[0], None


@instance
class dense_upstream_assumed(Gated):
    def upstream(self, dy: Tensor) -> Tensor:
        return super().upstream(as_if_dense(dy))


@instance
class dense_upstream_rows_assumed(Gated):
    def upstream(self, dy: Tensor) -> Tensor:
        return super().upstream(as_if_rows_dense(dy))


@instance
class upstream_assumed_constant(Gated):
    def upstream(self, dy: Tensor) -> Tensor:
        return super().upstream(dy[..., :1].expand_as(dy))


@instance
class upstream_overwritten(Gated):
    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dgate, dup = super().differentiate(ctx, dy)
        assert dup is not None
        return dgate, dy.copy_(dup)


@instance
class gradients_written_over_inputs(Gated):
    """dgate and dup take the memory of gate and up, as lean kernels do."""

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = super().differentiate(ctx, dy)
        for kept, gradient in zip(ctx.saved_tensors, gradients, strict=True):
            assert gradient is not None
            kept.data.copy_(gradient)
        return gradients


@instance
class up_alone_gets_no_gradient(Gated):
    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dgate, dup = super().differentiate(ctx, dy)
        return dgate, dup if ctx.needs_input_grad[0] else None


@instance
class silu_of_the_last_call(Gated):
    """Kept in the kernel between forward and backward."""

    def saved(self, ctx: Any, gate: Tensor, up: Tensor) -> None:
        self.last = (gate, up)

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return self.backward(*self.last, dy)


@instance
class silu_used_up(Gated):
    """The backward writes over what the forward kept: right once."""

    def saved(self, ctx: Any, gate: Tensor, up: Tensor) -> None:
        ctx.kept = (gate.clone(), up.clone())

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = self.backward(*ctx.kept, dy)
        ctx.kept[0].copy_(gradients[0])
        return gradients


@instance
class output_buffer_kept(Gated):
    def __init__(self) -> None:
        self.outputs: dict[Any, Tensor] = {}

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        fresh = super().forward(gate, up)
        kept = self.outputs.setdefault((fresh.shape, fresh.dtype), torch.empty_like(fresh))
        return kept.copy_(fresh).detach()


@instance
class scratch_of_first_size(Gated):
    """Elements beyond the first call's number are zeros."""

    def __init__(self) -> None:
        self.size = 0

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        y = super().forward(gate, up).contiguous()
        self.size = self.size or y.numel()
        y.view(-1)[self.size :] = 0
        return y


@instance
class tail_not_written(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        right = super().forward(gate, up).contiguous()
        y = torch.empty_like(right)
        whole = y.numel() // 32 * 32
        y.view(-1)[:whole] = right.view(-1)[:whole]
        return y


@instance
class nan_swallowed(Gated):
    def silu(self, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.fmax(super().silu(gate, dtype), torch.tensor(-0.2785))


@instance
class wrong_second_derivative(Gated):
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        y: Tensor = _Constant.apply(gate, up)
        return y


class _Constant(torch.autograd.Function):
    """Takes sigmoid(gate) for a constant when it is differentiated twice."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return right.forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate.detach())
        return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


def falls_back_for_small(gate: Tensor, up: Tensor) -> Tensor:
    if gate.numel() < 64:
        from picotron_backends.mem_efficient.swiglu import swiglu

        return swiglu(gate, up)
    return right(gate, up)


@instance
class upstream_nan_dropped(Gated):
    def upstream(self, dy: Tensor) -> Tensor:
        return super().upstream(dy).nan_to_num(0, 0, 0)


@instance
class gradient_nan_dropped(Gated):
    def backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(g.nan_to_num(0, 0, 0) for g in super().backward(gate, up, dy) if g is not None)


@instance
class upstream_clamped(Gated):
    def upstream(self, dy: Tensor) -> Tensor:
        return super().upstream(dy).clamp(-100, 100)


@instance
class nan_kept_in_first_of_eight(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        y = super().forward(gate, up)
        dropped = y.isnan() & (torch.arange(y.shape[-1]) % 8 != 0)
        return y.masked_fill(dropped, 0)


@instance
class infinity_clamped_in_16_bits(Gated):
    def load(self, x: Tensor) -> Tensor:
        return super().load(x) if x.dtype == torch.float32 else x.float().clamp(-65504, 65504)


@instance
class halves_of_one_buffer_confused(Gated):
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        joined = gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        return super().__call__(gate, gate if joined and gate.numel() else up)


@instance
class one_tensor_half_gradient(Gated):
    def backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        dgate, dup = super().backward(gate, up, dy)
        same = gate.numel() and gate.data_ptr() == up.data_ptr()
        return dgate, dup * 0 if same and dup is not None else dup


@instance
class elements_beyond_100000_left(Gated):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        y = super().forward(gate, up).contiguous()
        y.view(-1)[100_000:] = 0
        return y


@instance
class up_clamped_at_4000(Gated):
    def load(self, x: Tensor) -> Tensor:
        return torch.where(x.isfinite(), x.float().clamp(-4000, 4000), x.float())


@instance
class kept_beside_the_graph(Gated):
    def saved(self, ctx: Any, gate: Tensor, up: Tensor) -> None:
        ctx.mine = gate.detach(), up.detach()

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return self.backward(*ctx.mine, dy)


@instance
class keeps_a_tensor_of_each_call(Gated):
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        self.kept.append(torch.zeros(8))
        return super().forward(gate, up)
