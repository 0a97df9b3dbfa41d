"""Right attentions: one tiled kernel with its choices, and some that are built otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from picotron_core.ops.attention import check_arguments, visible

LOWEST = torch.finfo(torch.float32).min
LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of one call that are not q, k and v."""

    causal: bool
    scale: float
    sees: Tensor  # bool (1 or B, 1, T, S)


def _seen(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    offset: int | None = None,
    query_doc_ids: Tensor | None = None,
) -> Tensor:
    """bool (1 or B, 1, T, S); raises what the contract demands."""
    who: dict[str, Any] = {"causal": causal, "window": window, "doc_ids": doc_ids}
    who |= {"offset": offset, "query_doc_ids": query_doc_ids}
    check_arguments(q, k, **who)
    return visible(T=q.shape[2], S=k.shape[2], device=q.device, **who)


Forward = Callable[[Tensor, Tensor, Tensor, Asked], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A forward (out, lse) and a backward, called as the contract says."""

    forward: Forward
    backward: Backward

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        return_lse: bool = False,
        **placed: Any,
    ) -> Any:
        sees = _seen(q, k, causal=causal, **placed)
        asked = Asked(causal, q.shape[3] ** -0.5 if scale is None else scale, sees)
        out, lse = _Function.apply(q, k, v, asked, self)
        return (out, lse) if return_lse else out


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, asked: Asked, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        out, lse = kernel.forward(q, k, v, asked)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.asked, ctx.kernel = asked, kernel
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernel.backward(*ctx.saved_tensors, dout, dlse, ctx.asked), None, None)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As it lies in 16 bits, for a product that sums in float32."""
    return x.to(dtype).float()


def _expanded(x: Tensor, H: int) -> Tensor:
    return x.float().repeat_interleave(H // x.shape[1], 1)


def _added(dheads: Tensor, K: int) -> Tensor:
    """The sum over the query heads of a group."""
    B, H, S, D = dheads.shape
    return dheads.view(B, K, H // K, S, D).sum(2)


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiled:
    """Online softmax. The choices that kernels differ in are its fields."""

    rows: int = 32
    columns: int = 64
    base_2: bool = False
    reverse: bool = False
    scale_query: bool = False

    def logits(self, q: Tensor, k: Tensor, asked: Asked) -> Tensor:
        scale = asked.scale * (LOG2E if self.base_2 else 1.0)
        return (q * scale) @ k.mT if self.scale_query else (q @ k.mT) * scale

    def exp(self, x: Tensor) -> Tensor:
        return x.exp2() if self.base_2 else x.exp()

    def key_tiles(self, part: Tensor) -> list[slice]:
        """Those with a key that some query of the block sees."""
        tiles = [t for t in _tiles(part.shape[-1], self.columns) if part[..., t].any()]
        return tiles[::-1] if self.reverse else tiles

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        keys, values = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:3])
        for rows in _tiles(q.shape[2], self.rows):
            part = q[:, :, rows].float()
            top = torch.full((*part.shape[:3], 1), LOWEST)
            total, sums = torch.zeros_like(top), torch.zeros_like(part)
            for columns in self.key_tiles(asked.sees[:, :, rows]):
                logits = self.logits(part, keys[:, :, columns], asked)
                logits = logits.masked_fill(~asked.sees[:, :, rows, columns], -torch.inf)
                before, top = top, torch.maximum(top, logits.amax(-1, keepdim=True))
                p, shrink = self.exp(logits - top), self.exp(before - top)
                total = total * shrink + p.sum(-1, keepdim=True)
                sums = sums * shrink + _narrow(p, q.dtype) @ values[:, :, columns]
            out[:, :, rows] = sums / total.masked_fill(total == 0, 1)
            log = (top + total.log2()) / LOG2E if self.base_2 else top + total.log()
            lse[:, :, rows] = log.squeeze(-1)
        return out, lse


def _shift(out: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    return (dout.float() * out.float()).sum(-1, keepdim=True) - dlse[..., None]


def _weights(q: Tensor, k: Tensor, lse: Tensor, asked: Asked) -> Tensor:
    """All of them again: (B, H, T, S)."""
    logits = (q.float() @ _expanded(k, q.shape[1]).mT) * asked.scale
    floor = lse.clamp(min=LOWEST)[..., None]
    return (logits.masked_fill(~asked.sees, -torch.inf) - floor).exp()


def in_float32(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    asked: Asked,
) -> tuple[Tensor, Tensor, Tensor]:
    """P and dlogits in 16 bits for the products, sums and groups in float32."""
    return _from_weights(q, k, v, _weights(q, k, lse, asked), _shift(out, dout, dlse), dout, asked)


def _from_weights(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, shift: Tensor, dout: Tensor, asked: Asked
) -> tuple[Tensor, Tensor, Tensor]:
    dp = dout.float() @ _expanded(v, q.shape[1]).mT
    dlogits = _narrow(p * (dp - shift), q.dtype)
    dq = (dlogits @ _expanded(k, q.shape[1])) * asked.scale
    dk = _added((dlogits.mT @ q.float()) * asked.scale, k.shape[1])
    dv = _added(_narrow(p, q.dtype).mT @ dout.float(), k.shape[1])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def delta_of_p_dp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    asked: Asked,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights are divided by their own sum, or P (dP - sum P dP) would not cancel."""
    logits = (q.float() @ _expanded(k, q.shape[1]).mT) * asked.scale
    p = logits.masked_fill(~asked.sees, -torch.inf).softmax(-1).masked_fill(~asked.sees, 0)
    dp = dout.float() @ _expanded(v, q.shape[1]).mT
    shift = (p * dp).sum(-1, keepdim=True) - dlse[..., None]
    return _from_weights(q, k, v, p, shift, dout, asked)


def by_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    asked: Asked,
) -> tuple[Tensor, Tensor, Tensor]:
    """As if there were a key and a value for each query head: a gradient each, stored, added."""
    H, K = q.shape[1], k.shape[1]
    keys, values = (x.repeat_interleave(H // K, 1) for x in (k, v))
    dq, dk, dv = in_float32(q, keys, values, out, lse, dout, dlse, asked)
    return dq, _added(dk.float(), K).to(k.dtype), _added(dv.float(), K).to(v.dtype)


def keys_first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    asked: Asked,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block of keys is held, its dk and dv are summed over all queries; dq is added to."""
    shift, H = _shift(out, dout, dlse), q.shape[1]
    keys, values = _expanded(k, H), _expanded(v, H)
    floor = lse.clamp(min=LOWEST)[..., None]
    dq = torch.zeros(q.shape)
    dk, dv = torch.zeros(keys.shape), torch.zeros(values.shape)
    for columns in _tiles(k.shape[2], 32):
        for rows in _tiles(q.shape[2], 16):
            near, far, back = q[:, :, rows].float(), keys[:, :, columns], dout[:, :, rows].float()
            logits = ((near * asked.scale) @ far.mT).masked_fill(
                ~asked.sees[:, :, rows, columns], -torch.inf
            )
            p = (logits - floor[:, :, rows]).exp()
            dp = back @ values[:, :, columns].mT
            dlogits = _narrow(p * (dp - shift[:, :, rows]), q.dtype)
            dq[:, :, rows] += dlogits @ far
            dk[:, :, columns] += dlogits.mT @ near
            dv[:, :, columns] += _narrow(p, q.dtype).mT @ back
    K = k.shape[1]
    return (
        (dq * asked.scale).to(q.dtype),
        (_added(dk, K) * asked.scale).to(k.dtype),
        _added(dv, K).to(v.dtype),
    )


def _split(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """Each part of the keys gives a normalised float32 out and its lse; exp(lse) weighs them."""
    S, tiled = k.shape[2], Tiled()
    outs, lses = [], []
    for part in _tiles(S, max(1, -(-S // 3))):
        seen = Asked(asked.causal, asked.scale, asked.sees[..., part])
        out, lse = tiled(q.float(), k[:, :, part], v[:, :, part], seen)
        outs.append(out)
        lses.append(lse)
    lse = torch.stack(lses).logsumexp(0)
    weights = (torch.stack(lses) - lse.clamp(min=LOWEST)).exp()
    return (weights[..., None] * torch.stack(outs)).sum(0).to(q.dtype), lse


def _as_rows(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """(B, K, H / K * T, D) queries: keys and values are never expanded."""
    (B, H, T, D), K = q.shape, k.shape[1]
    queries = q.reshape(B, K, H // K * T, D)
    sees = asked.sees.repeat(1, 1, H // K, 1)
    out, lse = Tiled()(queries, k, v, Asked(asked.causal, asked.scale, sees))
    return out.view(B, H, T, D), lse.view(B, H, T)


def _transposed(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    out, lse = Tiled()(q, k, v, asked)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _transposed_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = in_float32(*arguments)
    return (
        dq.transpose(1, 2).contiguous().transpose(1, 2),
        dk.transpose(1, 2).contiguous().transpose(1, 2),
        dv.transpose(2, 3).contiguous().transpose(2, 3),
    )


def _padded(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """Whole tiles of 16 queries and 32 keys; D to a multiple of 16."""
    (T, D), S = q.shape[2:], k.shape[2]
    wide, longer, deeper = -D % 16, -S % 32, -T % 16
    sees = pad(asked.sees, (0, longer, 0, deeper), value=False)
    out, lse = Tiled(rows=16, columns=32)(
        pad(q, (0, wide, 0, deeper)),
        pad(k, (0, wide, 0, longer)),
        pad(v, (0, wide, 0, longer)),
        Asked(asked.causal, asked.scale, sees),
    )
    return out[:, :, :T, :D], lse[:, :, :T]


def _whole(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    logits = (q.float() @ _expanded(k, q.shape[1]).mT) * asked.scale
    logits = logits.masked_fill(~asked.sees, -torch.inf)
    p = logits.softmax(-1).masked_fill(~asked.sees, 0)
    out = _narrow(p, q.dtype) @ _expanded(v, q.shape[1])
    return out.to(q.dtype), logits.logsumexp(-1)


def double_precision(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    return_lse: bool = False,
    **placed: Any,
) -> Any:
    sees = _seen(q, k, causal=causal, **placed)
    D, groups = q.shape[3], q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    logits = (q.double() @ keys.mT) * (1 / math.sqrt(D) if scale is None else scale)
    logits = logits.masked_fill(~sees, -torch.inf)
    out = (logits.softmax(-1).masked_fill(~sees, 0) @ values).to(q.dtype)
    return (out, logits.logsumexp(-1).float()) if return_lse else out


def eager_16_bits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    return_lse: bool = False,
    **placed: Any,
) -> Any:
    """As models do it by hand: products in the inputs' dtype, softmax in float32, by autograd."""
    sees = _seen(q, k, causal=causal, **placed)
    D, groups = q.shape[3], q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = ((q @ keys.mT) * (D**-0.5 if scale is None else scale)).float()
    logits = logits.masked_fill(~sees, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~sees, 0)
    out = weights.to(q.dtype) @ values
    return (out, logits.logsumexp(-1)) if return_lse else out


class _TF32(torch.autograd.Function):
    """a @ b with both, and in the backward all three, rounded to ten bits of mantissa."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _ten_bits(a) @ _ten_bits(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        dy = _ten_bits(dy)
        return dy @ _ten_bits(b).mT, _ten_bits(a).mT @ dy


def _ten_bits(x: Tensor) -> Tensor:
    """To the nearest: adding half of the last kept bit may carry into the exponent, as it must."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), x)


def tensor_float_32(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    return_lse: bool = False,
    **placed: Any,
) -> Any:
    sees = _seen(q, k, causal=causal, **placed)
    D, groups = q.shape[3], q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    logits = _TF32.apply(q.float(), keys.mT) * (D**-0.5 if scale is None else scale)
    logits = logits.masked_fill(~sees, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~sees, 0)
    out = _TF32.apply(weights, values).to(q.dtype)
    return (out, logits.logsumexp(-1)) if return_lse else out


def partial(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **options: Any) -> Any:
    """Raises ValueError for all that its `supports` refuses."""
    extras = [name for name, value in options.items() if value is not None and value is not False]
    if set(extras) - {"scale"} or q.shape[2] != k.shape[2]:
        raise ValueError(f"{extras or 'T != S'}: not served by this kernel")
    if q.dtype == torch.float32 or q.shape[3] > 128:
        raise ValueError(f"{q.dtype} with D={q.shape[3]}: not served by this kernel")
    return tiles_32_64(q, k, v, causal=causal, scale=options.get("scale"))


tiles_32_64 = Kernel(Tiled(), in_float32)
tiles_64_16 = Kernel(Tiled(rows=64, columns=16), keys_first)
base_2 = Kernel(Tiled(base_2=True), in_float32)
keys_in_reverse = Kernel(Tiled(reverse=True), in_float32)
query_scaled_first = Kernel(Tiled(scale_query=True, base_2=True), keys_first)
split_keys = Kernel(_split, in_float32)
keys_outside = Kernel(Tiled(rows=128, columns=128), keys_first)
delta_of_weights = Kernel(Tiled(), delta_of_p_dp)
heads_rounded_then_added = Kernel(Tiled(), by_head)
groups_as_rows = Kernel(_as_rows, in_float32)
rows_of_transposed_memory = Kernel(_transposed, _transposed_gradients)
tiles_padded = Kernel(_padded, keys_first)
whole_matrix = Kernel(_whole, in_float32)


def traceable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    return_lse: bool = False,
    **placed: Any,
) -> Any:
    sees = _seen(q, k, causal=causal, **placed)
    (B, H, T, D), K = q.shape, k.shape[1]
    grouped = q.float().reshape(B, K, H // K, T, D)
    logits = torch.einsum("bkgtd,bksd->bkgts", grouped, k.float())
    logits = logits * (D**-0.5 if scale is None else scale)
    logits = logits.masked_fill(~sees[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0)).exp()
    out = torch.einsum("bkgts,bksd->bkgtd", weights, v.float()).reshape(q.shape).to(q.dtype)
    return (out, lse.reshape(B, H, T)) if return_lse else out
