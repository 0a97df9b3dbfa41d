"""Wrong rotary embeddings. Each is the right one of `Turn` with one thing wrong."""

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
    truncated,
)

Pair = tuple[Tensor, Tensor]


class Turn:
    """Right: rotate-half in float32, rounded once; the backward turns the other way."""

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        answer: Pair = _Function.apply(q, k, cos, sin, self)
        return answer

    def load(self, x: Tensor) -> Tensor:
        return x.float()

    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        """Against (B, H, T, D/2)."""
        return cos.unsqueeze(-3), sin.unsqueeze(-3)

    def halves(self, x: Tensor) -> Pair:
        first, second = x.chunk(2, -1)
        return first, second

    def joined(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), -1)

    def turned(self, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return first * cos - second * sin, second * cos + first * sin

    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = self.tables(cos, sin, x)
        first, second = self.halves(self.load(x))
        return self.store(self.joined(*self.turned(first, second, cos, sin)), x.dtype)

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.turn(q, cos, sin), self.turn(k, cos, sin)

    def upstream(self, dy: Tensor) -> Tensor:
        return dy

    def back(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.turn(self.upstream(dy), cos, -sin)

    def saved(self, ctx: Any, cos: Tensor, sin: Tensor) -> None:
        ctx.save_for_backward(cos, sin)

    def differentiate(self, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return self.back(dq, cos, sin), self.back(dk, cos, sin)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernel: Turn) -> Pair:
        kernel.saved(ctx, cos, sin)
        ctx.kernel = kernel
        return kernel.forward(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernel.differentiate(ctx, dq, dk), None, None, None)


right = Turn()


@instance
class pairs_side_by_side(Turn):
    def halves(self, x: Tensor) -> Pair:
        return x[..., 0::2], x[..., 1::2]

    def joined(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second), -1).flatten(-2)


@instance
class turned_the_other_way(Turn):
    def turned(self, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return super().turned(first, second, cos, -sin)

    def back(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return super().back(dy, cos, sin)


@instance
class both_halves_minus(Turn):
    def turned(self, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return first * cos - second * sin, second * cos - first * sin


@instance
class second_half_of_turned_first(Turn):
    """The first half is overwritten before the second one reads it."""

    def turned(self, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        first = first * cos - second * sin
        return first, second * cos + first * sin


@instance
class position_off_by_one(Turn):
    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        return super().tables(cos.roll(1, -2), sin.roll(1, -2), x)


@instance
class k_not_turned(Turn):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.turn(q, cos, sin), k.clone()


@instance
class k_of_first_position(Turn):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.turn(q, cos, sin), self.turn(k, cos[..., :1, :], sin[..., :1, :])


@instance
class tables_of_first_sequence(Turn):
    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        return super().tables(*((t[0] if t.dim() == 3 else t) for t in (cos, sin)), x)


@instance
class tables_of_first_sequence_for_one_token(Turn):
    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        first = cos.dim() == 3 and x.shape[2] == 1
        return super().tables(*((t[0] if first else t) for t in (cos, sin)), x)


@instance
class tables_along_heads(Turn):
    """Taken for (H, D/2) where there are as many heads as tokens."""

    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        if cos.dim() == 2 and x.shape[1] == x.shape[2]:
            return cos[:, None], sin[:, None]
        return super().tables(cos, sin, x)


@instance
class batch_of_tables_along_heads(Turn):
    """Those of a sequence each are taken for one per head where B = H."""

    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        if cos.dim() == 3 and x.shape[0] == x.shape[1]:
            return cos, sin
        return super().tables(cos, sin, x)


@instance
class tables_in_bfloat16(Turn):
    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        return super().tables(cos.bfloat16().float(), sin.bfloat16().float(), x)


@instance
class sine_made_of_cosine(Turn):
    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        made = (1 - cos.square()).clamp(min=0).sqrt().copysign(sin)
        return super().tables(cos, made, x)


@instance
class tables_made_of_positions(Turn):
    """cos and sin are not looked at: positions 0, 1, 2 with base 10 000."""

    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        T, D = x.shape[-2:]
        frequency = 10000.0 ** (-torch.arange(0, D, 2) / D)
        angle = torch.arange(T)[:, None] * frequency
        return angle.cos()[None], angle.sin()[None]


@instance
class tables_read_dense(Turn):
    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        return super().tables(as_if_dense(cos), as_if_dense(sin), x)


@instance
class sine_read_with_strides_of_cosine(Turn):
    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        return super().tables(cos, sin.as_strided(sin.shape, cos.stride()), x)


@instance
class widths_of_whole_vectors_alone(Turn):
    """Pairs after the last whole vector of four stay as they are."""

    def turned(self, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        whole = first.shape[-1] // 4 * 4
        one, other = super().turned(first, second, cos, sin)
        kept = torch.arange(first.shape[-1]) >= whole
        return torch.where(kept, first, one), torch.where(kept, second, other)


@instance
class width_beyond_64_not_turned(Turn):
    def turned(self, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        one, other = super().turned(first, second, cos, sin)
        kept = torch.arange(first.shape[-1]) >= 32
        return torch.where(kept, first, one), torch.where(kept, second, other)


@instance
class heads_beyond_four_not_turned(Turn):
    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = super().turn(x, cos, sin)
        y[:, 4:] = x[:, 4:]
        return y


@instance
class tokens_beyond_32_not_turned(Turn):
    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = super().turn(x, cos, sin)
        y[:, :, 32:] = x[:, :, 32:]
        return y


@instance
class one_token_not_turned(Turn):
    """T = 1 is taken for position 0."""

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x.clone() if x.shape[2] == 1 else super().turn(x, cos, sin)


@instance
class truncating_store(Turn):
    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return truncated(x, dtype)


@instance
class returns_float32(Turn):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.turn(q.float(), cos, sin), self.turn(k.float(), cos, sin)


@instance
class dense_inputs_assumed(Turn):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_dense(x))


@instance
class dense_rows_assumed(Turn):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_rows_dense(x))


@instance
class joined_rows_assumed(Turn):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_rows_joined(x))


@instance
class q_and_k_swapped(Turn):
    """Where they have as many heads, nobody sees it by shape."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        q_out, k_out = super().forward(q, k, cos, sin)
        return (k_out, q_out) if q.shape == k.shape else (q_out, k_out)


@instance
class turned_in_place(Turn):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        q_out, k_out = super().forward(q, k, cos, sin)
        q.copy_(q_out)
        return q_out, k_out


@instance
class sine_negated_in_place(Turn):
    """The backward turns the caller's table and puts it back."""

    def back(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        sin.neg_()
        dx = self.turn(self.upstream(dy), cos, sin)
        sin.neg_()
        return dx


@instance
class input_given_out(Turn):
    """At position 0 nothing turns, so q itself is returned."""

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        answer = super().__call__(q, k, cos, sin)
        still = bool((cos == 1).all()) and bool((sin == 0).all())
        return (q, k) if still else answer


@instance
class backward_turns_on(Turn):
    def back(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.turn(self.upstream(dy), cos, sin)


@instance
class backward_inverts(Turn):
    """The inverse is the transpose only where cos^2 + sin^2 = 1."""

    def back(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        length = cos.square() + sin.square()
        return self.turn(self.upstream(dy), cos / length, -sin / length)


@instance
class dk_missing(Turn):
    def differentiate(self, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return super().differentiate(ctx, dq, dk)[0], None


@instance
class dk_of_q(Turn):
    """Adds dq to dk where nothing was asked of k."""

    def differentiate(self, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        found_q, found_k = super().differentiate(ctx, dq, dk)
        assert found_q is not None
        lonely = not dk.any() and dk.numel() > 0
        return found_q, (found_q[:, : dk.shape[1]].clone() if lonely else found_k)


@instance
class both_results_must_be_used(Turn):
    """Fails where no gradient comes back to one of them."""

    def saved(self, ctx: Any, cos: Tensor, sin: Tensor) -> None:
        super().saved(ctx, cos, sin)
        ctx.set_materialize_grads(False)


@instance
class dense_upstream_assumed(Turn):
    def upstream(self, dy: Tensor) -> Tensor:
        return as_if_dense(dy)


@instance
class dense_upstream_rows_assumed(Turn):
    def upstream(self, dy: Tensor) -> Tensor:
        return as_if_rows_dense(dy)


@instance
class upstream_turned_in_place(Turn):
    def back(self, dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return dy.copy_(super().back(dy, cos, sin))


@instance
class k_alone_gets_no_gradient(Turn):
    def differentiate(self, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        found = super().differentiate(ctx, dq, dk)
        return found if ctx.needs_input_grad[0] else (None, None)


@instance
class tables_remembered_by_length(Turn):
    """The first tables of a length serve all."""

    def __init__(self) -> None:
        self.known: dict[Any, Pair] = {}

    def tables(self, cos: Tensor, sin: Tensor, x: Tensor) -> Pair:
        key = (cos.shape, x.shape[-1], bool((sin < 0).any()))
        return self.known.setdefault(key, super().tables(cos.clone(), sin.clone(), x))


@instance
class output_buffer_kept(Turn):
    def __init__(self) -> None:
        self.outputs: dict[Any, Tensor] = {}

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        fresh = super().turn(x, cos, sin)
        kept = self.outputs.setdefault((fresh.shape, fresh.dtype), torch.empty_like(fresh))
        return kept.copy_(fresh).detach()


@instance
class tables_of_the_last_call(Turn):
    def saved(self, ctx: Any, cos: Tensor, sin: Tensor) -> None:
        self.last = (cos, sin)

    def differentiate(self, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = self.last
        return self.back(dq, cos, sin), self.back(dk, cos, sin)


@instance
class nan_swallowed(Turn):
    def load(self, x: Tensor) -> Tensor:
        return super().load(x).nan_to_num()


def falls_back_for_few_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    if k.shape[1] == 1:
        from picotron_backends.naive_math.rope import rope

        return rope(q, k, cos, sin)
    answer: Pair = right(q, k, cos, sin)
    return answer


@instance
class upstream_nan_dropped(Turn):
    def upstream(self, dy: Tensor) -> Tensor:
        return dy.nan_to_num(0, 0, 0)


@instance
class upstream_clamped(Turn):
    def upstream(self, dy: Tensor) -> Tensor:
        return dy.clamp(-100, 100)


@instance
class wide_and_late_tokens_left(Turn):
    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = super().turn(x, cos, sin)
        if x.shape[-1] >= 128:
            y[:, :, 32:] = x[:, :, 32:]
        return y


@instance
class pairs_beyond_64_left(Turn):
    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = super().turn(x, cos, sin).contiguous()
        y.view(-1, *y.shape[2:])[64:] = x.reshape(-1, *y.shape[2:])[64:]
        return y


@instance
class one_tensor_turned_once(Turn):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned, other = super().forward(q, k, cos, sin)
        return turned, k.clone() if q.numel() and q.data_ptr() == k.data_ptr() else other


@instance
class tables_kept_beside_the_graph(Turn):
    def saved(self, ctx: Any, cos: Tensor, sin: Tensor) -> None:
        ctx.mine = cos, sin

    def differentiate(self, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return self.back(dq, *ctx.mine), self.back(dk, *ctx.mine)


@instance
class first_tables_where_q_is_frozen(Turn):
    def differentiate(self, ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if not ctx.needs_input_grad[0] and cos.dim() == 3:
            cos, sin = (table[:1].expand_as(table) for table in (cos, sin))
        return self.back(dq, cos, sin), self.back(dk, cos, sin)
