"""Wrong RMS norms. Each is the right one of `Norm` with one thing wrong."""

from __future__ import annotations

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


class Norm:
    """Right: y = cast(x r) w with r = 1 / sqrt(mean(x^2) + eps), backward by hand."""

    def __call__(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        y: Tensor = _Function.apply(x, weight, self, eps)
        return y

    def load(self, x: Tensor) -> Tensor:
        return x.float()

    def load_weight(self, weight: Tensor) -> Tensor:
        return weight

    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.square().mean(-1, keepdim=True)

    def root(self, power: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return torch.rsqrt(power + eps)

    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    def normed(self, x: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
        return self.store(x * r, dtype)

    def forward(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = self.load(x)
        r = self.root(self.power(exact, x.dtype), eps, x.dtype)
        return self.normed(exact, r, x.dtype) * self.load_weight(weight)

    def upstream(self, dy: Tensor) -> Tensor:
        return dy

    def dx(self, x: Tensor, r: Tensor, dnormed: Tensor) -> Tensor:
        along = (dnormed * x).mean(-1, keepdim=True)
        return r * dnormed - x * r.pow(3) * along

    def dweight(self, dy: Tensor, normed: Tensor) -> Tensor:
        return (dy.float() * normed.float()).flatten(0, -2).sum(0)

    def backward(
        self, x: Tensor, weight: Tensor, dy: Tensor, eps: float
    ) -> tuple[Tensor | None, ...]:
        exact, dy = self.load(x), self.upstream(dy)
        r = self.root(self.power(exact, x.dtype), eps, x.dtype)
        dx = self.dx(exact, r, self.dnormed(dy, self.load_weight(weight)).float())
        dweight = self.dweight(dy[None], self.normed(exact, r, x.dtype)[None])
        return dx.to(x.dtype), dweight.to(weight.dtype)

    def dnormed(self, dy: Tensor, weight: Tensor) -> Tensor:
        return dy * weight

    def saved(self, ctx: Any, x: Tensor, weight: Tensor) -> None:
        ctx.save_for_backward(x, weight)

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return self.backward(*ctx.saved_tensors, dy, ctx.eps)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel: Norm, eps: float) -> Tensor:
        kernel.saved(ctx, x, weight)
        ctx.kernel, ctx.eps = kernel, eps
        return kernel.forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernel.differentiate(ctx, dy), None, None)


right = Norm()


@instance
class eps_dropped(Norm):
    def root(self, power: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return super().root(power, torch.finfo(torch.float32).tiny, dtype)


@instance
class eps_fixed(Norm):
    def root(self, power: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return super().root(power, 1e-5, dtype)


@instance
class eps_outside_of_root(Norm):
    def root(self, power: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return 1 / (power.sqrt() + eps)


@instance
class eps_as_floor(Norm):
    def root(self, power: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return power.clamp(min=eps).rsqrt()


@instance
class mean_subtracted(Norm):
    def load(self, x: Tensor) -> Tensor:
        return x.float() - x.float().mean(-1, keepdim=True)


@instance
class sum_not_mean(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.square().sum(-1, keepdim=True)


@instance
class mean_of_padded_width(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        padded = 1 << (x.shape[-1] - 1).bit_length()
        return x.square().sum(-1, keepdim=True) / padded


@instance
class mean_over_all_rows(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.square().mean().expand(*x.shape[:-1], 1) if x.numel() else super().power(x, dtype)


@instance
class unbiased_mean(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.square().sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)


@instance
class width_tail_dropped(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        whole = x.shape[-1] // 8 * 8 or x.shape[-1]
        return super().power(x[..., :whole], dtype)


@instance
class width_beyond_2048_dropped(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return super().power(x[..., :2048], dtype)


@instance
class squares_in_16_bits(Norm):
    """x^2 in the inputs' dtype: rounded in bfloat16, infinite in float16 from 256 on."""

    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return narrow(x.square(), dtype).mean(-1, keepdim=True)


@instance
class squares_overflow_float16(Norm):
    """Right in bfloat16 and for moderate float16."""

    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        power = super().power(x, dtype)
        return power.half().float() if dtype == torch.float16 else power


@instance
class root_in_16_bits(Norm):
    def root(self, power: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return narrow(super().root(power, eps, dtype), dtype)


@instance
class fast_inverse_root(Norm):
    """By the bits of a float, with a single step of Newton's."""

    def root(self, power: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = power + eps
        y = (0x5F3759DF - (x.view(torch.int32) >> 1)).view(torch.float32)
        return y * (1.5 - 0.5 * x * y * y)


@instance
class root_of_absolute_value(Norm):
    """1 / mean |x|: the same for constant rows."""

    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.abs().mean(-1, keepdim=True).square()


@instance
class weight_positive(Norm):
    def load_weight(self, weight: Tensor) -> Tensor:
        return weight.abs()


@instance
class weight_ignored(Norm):
    def load_weight(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)


@instance
class weight_plus_one(Norm):
    """Gemma's convention."""

    def load_weight(self, weight: Tensor) -> Tensor:
        return 1 + weight


@instance
class weight_tail_ignored(Norm):
    """Lanes after the last whole vector of eight keep a factor of 1."""

    def load_weight(self, weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[len(weight) // 8 * 8 :] = 1
        return weight


@instance
class truncating_store(Norm):
    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return truncated(x, dtype)


@instance
class returns_float32(Norm):
    def forward(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().forward(x, weight, eps).float()


@instance
class rows_beyond_256_dropped(Norm):
    def normed(self, x: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
        r = r.clone()
        r.view(-1)[256:] = 0
        return super().normed(x, r, dtype)


@instance
class no_rows_fail(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        assert x.numel() > 0, "invalid grid: 0 blocks"
        return super().power(x, dtype)


@instance
class one_dim_fails(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        assert x.shape[-2] >= 0
        return super().power(x, dtype)


@instance
class dense_input_assumed(Norm):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_dense(x))


@instance
class dense_rows_assumed(Norm):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_rows_dense(x))


@instance
class joined_rows_assumed(Norm):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_rows_joined(x))


@instance
class dense_weight_assumed(Norm):
    def load_weight(self, weight: Tensor) -> Tensor:
        return as_if_rows_dense(weight)


@instance
class normed_in_place(Norm):
    def forward(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = super().forward(x, weight, eps)
        x.mul_(1)
        return y


@instance
class dx_without_correction(Norm):
    def dx(self, x: Tensor, r: Tensor, dnormed: Tensor) -> Tensor:
        return r * dnormed


@instance
class dx_correction_not_averaged(Norm):
    def dx(self, x: Tensor, r: Tensor, dnormed: Tensor) -> Tensor:
        return r * dnormed - x * r.pow(3) * (dnormed * x).sum(-1, keepdim=True)


@instance
class dx_correction_squared(Norm):
    """r^2 for r^3: the same where rows have a root mean square of 1."""

    def dx(self, x: Tensor, r: Tensor, dnormed: Tensor) -> Tensor:
        return r * dnormed - x * r.pow(2) * (dnormed * x).mean(-1, keepdim=True)


@instance
class dx_without_weight(Norm):
    def dnormed(self, dy: Tensor, weight: Tensor) -> Tensor:
        return dy


@instance
class dx_sums_in_16_bits(Norm):
    def dx(self, x: Tensor, r: Tensor, dnormed: Tensor) -> Tensor:
        along = (dnormed * x).bfloat16().float().mean(-1, keepdim=True).bfloat16().float()
        return r * dnormed - x * r.pow(3) * along

    def backward(
        self, x: Tensor, weight: Tensor, dy: Tensor, eps: float
    ) -> tuple[Tensor | None, ...]:
        kernel = super() if x.dtype == torch.bfloat16 else right
        return kernel.backward(x, weight, dy, eps)


@instance
class dweight_missing(Norm):
    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return super().differentiate(ctx, dy)[0], None


@instance
class dweight_of_x(Norm):
    def backward(
        self, x: Tensor, weight: Tensor, dy: Tensor, eps: float
    ) -> tuple[Tensor | None, ...]:
        dx, _ = super().backward(x, weight, dy, eps)
        return dx, self.dweight(dy[None], x[None]).to(weight.dtype)


@instance
class dweight_averaged(Norm):
    def dweight(self, dy: Tensor, normed: Tensor) -> Tensor:
        return (dy.float() * normed.float()).flatten(0, -2).mean(0)


@instance
class dweight_added_in_16_bits(Norm):
    """Row after row, each addition rounded."""

    def dweight(self, dy: Tensor, normed: Tensor) -> Tensor:
        rows = (dy * normed).flatten(0, -2)
        total = torch.zeros(rows.shape[-1], dtype=dy.dtype)
        for row in rows:
            total += row
        return total


@instance
class dweight_of_last_block(Norm):
    """Blocks of 64 rows, each of which overwrites the sum."""

    def dweight(self, dy: Tensor, normed: Tensor) -> Tensor:
        rows = (dy.float() * normed.float()).flatten(0, -2)
        return rows[max(0, len(rows) - 1) // 64 * 64 :].sum(0)


@instance
class dweight_of_first_sequence(Norm):
    def dweight(self, dy: Tensor, normed: Tensor) -> Tensor:
        if dy.dim() < 4 or not dy.numel():
            return super().dweight(dy, normed)
        return super().dweight(dy[:, :1], normed[:, :1])


@instance
class dense_upstream_assumed(Norm):
    def upstream(self, dy: Tensor) -> Tensor:
        return as_if_dense(dy)


@instance
class dense_upstream_rows_assumed(Norm):
    def upstream(self, dy: Tensor) -> Tensor:
        return as_if_rows_dense(dy)


@instance
class upstream_overwritten(Norm):
    """dx is written over dy, as a kernel does that owns it."""

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = super().differentiate(ctx, dy)
        assert dx is not None
        return dy.copy_(dx), dweight


@instance
class weight_alone_gets_no_gradient(Norm):
    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = super().differentiate(ctx, dy)
        return dx, dweight if ctx.needs_input_grad[0] else None


@instance
class frozen_weight_fails(Norm):
    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = super().differentiate(ctx, dy)
        if not ctx.needs_input_grad[1]:
            raise IndexError("no gradient buffer was allocated")
        return dx, dweight


@instance
class dweight_buffer_kept(Norm):
    def __init__(self) -> None:
        self.sums: dict[Any, Tensor] = {}

    def dweight(self, dy: Tensor, normed: Tensor) -> Tensor:
        fresh = super().dweight(dy, normed)
        kept = self.sums.setdefault((fresh.shape, dy.dtype), torch.zeros_like(fresh))
        return kept.add_(fresh)


@instance
class output_buffer_kept(Norm):
    def __init__(self) -> None:
        self.outputs: dict[Any, Tensor] = {}

    def forward(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        fresh = super().forward(x, weight, eps)
        kept = self.outputs.setdefault((fresh.shape, fresh.dtype), torch.empty_like(fresh))
        return kept.copy_(fresh).detach()


@instance
class weight_remembered(Norm):
    """A copy of the weight, made once per address."""

    def __init__(self) -> None:
        self.weights: dict[Any, Tensor] = {}

    def load_weight(self, weight: Tensor) -> Tensor:
        key = (weight.data_ptr(), weight.shape, weight.dtype)
        return self.weights.setdefault(key, weight.clone())


@instance
class x_of_the_last_call(Norm):
    def saved(self, ctx: Any, x: Tensor, weight: Tensor) -> None:
        self.last = (x, weight)

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return self.backward(*self.last, dy, ctx.eps)


@instance
class dweight_not_cleared(Norm):
    def dweight(self, dy: Tensor, normed: Tensor) -> Tensor:
        fresh = super().dweight(dy, normed)
        return torch.empty_like(fresh).add_(fresh)


@instance
class tail_not_written(Norm):
    """Elements after the last whole vector of eight."""

    def forward(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        right = super().forward(x, weight, eps)
        y = torch.empty_like(right)
        whole = x.shape[-1] // 8 * 8
        y[..., :whole] = right[..., :whole]
        return y


@instance
class nan_swallowed(Norm):
    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return super().power(x.nan_to_num(), dtype)

    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return super().store(x.nan_to_num(), dtype)


@instance
class nan_of_row_dropped(Norm):
    """The mean leaves NaN out: the rest of the row looks well."""

    def power(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.square().nan_to_num().mean(-1, keepdim=True)


@instance
class wrong_second_derivative(Norm):
    def __call__(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        y: Tensor = _Constant.apply(x, weight, eps)
        return y


class _Constant(torch.autograd.Function):
    """Takes r for a constant when it is differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return right.forward(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        r = torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + ctx.eps)
        dx = right.dx(x.float(), r, (dy * weight).float())
        dweight = right.dweight(dy[None], (x.float() * r).to(x.dtype)[None])
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def random_numbers_drawn(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    torch.rand(())
    return right(x, weight, eps=eps)


def falls_back_for_odd_widths(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    if x.shape[-1] % 4:
        from picotron_backends.naive_math.norm import rms_norm

        return rms_norm(x, weight, eps=eps)
    return right(x, weight, eps=eps)


def ignores_unclaimed_float16(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Its `supports` says no to float16; called all the same, it overflows."""
    if x.dtype == torch.float16:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return right(x, weight, eps=eps)


@instance
class upstream_nan_dropped(Norm):
    def upstream(self, dy: Tensor) -> Tensor:
        return dy.nan_to_num(0, 0, 0)


@instance
class upstream_clamped(Norm):
    def upstream(self, dy: Tensor) -> Tensor:
        return dy.clamp(-100, 100)


@instance
class upstream_times_128_in_16_bits(Norm):
    def upstream(self, dy: Tensor) -> Tensor:
        return (dy * 128) / 128


@instance
class eps_0_taken_for_none(Norm):
    def root(self, power: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return super().root(power, eps or 1e-5, dtype)


@instance
class wide_rows_beyond_16_forgotten(Norm):
    def dweight(self, dy: Tensor, normed: Tensor) -> Tensor:
        E = dy.shape[-1]
        dy, normed = dy.reshape(-1, E), normed.reshape(-1, E)
        rows = 16 if E >= 1024 else len(dy)
        return (dy[:rows].float() * normed[:rows].float()).sum(0)


@instance
class rows_beyond_65535_left(Norm):
    def forward(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = super().forward(x, weight, eps).contiguous()
        y.view(-1, y.shape[-1])[65535:] = 0
        return y


@instance
class weight_kept_on_the_tensor(Norm):
    def __call__(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        kept = getattr(weight, "_converted", None)
        if kept is None:
            kept = weight._converted = weight.detach().clone()  # type: ignore[attr-defined]
        return super().__call__(x, weight + (kept - weight).detach(), eps=eps)


@instance
class kept_beside_the_graph(Norm):
    def saved(self, ctx: Any, x: Tensor, weight: Tensor) -> None:
        ctx.mine = x.detach(), weight.detach()

    def differentiate(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return self.backward(*ctx.mine, dy, ctx.eps)
