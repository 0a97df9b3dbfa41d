"""A right attention in pieces, forward and backward, tile by tile: a mutant gets one piece wrong.

Written like a real kernel: 16-bit products summed in float32, the weights rounded to the inputs'
dtype before they meet v, the backward made of q, k, v, out and lse. For brevity heads are expanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picotron_core.ops.attention import check_arguments

LOWEST = torch.finfo(torch.float32).min  # not -inf: in a row that sees nothing, -inf - -inf is NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What does not change between the tiles of a call."""

    T: int
    S: int
    causal: bool
    scale: float
    window: int | None
    doc_ids: Tensor | None
    first: int  # the position of query 0
    query_doc_ids: Tensor | None


class Flash:
    """Each method is a piece; `rows` and `columns` are slices of queries and of keys."""

    tile = 32

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **asked: Any
    ) -> Any:
        out, lse = _Function.apply(q, k, v, self, self.asked(q, k, **asked))
        return (out, lse) if return_lse else out

    def asked(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        window: int | None = None,
        doc_ids: Tensor | None = None,
        offset: int | None = None,
        query_doc_ids: Tensor | None = None,
    ) -> Call:
        self.check(
            q,
            k,
            causal=causal,
            window=window,
            doc_ids=doc_ids,
            offset=offset,
            query_doc_ids=query_doc_ids,
        )
        T, S = q.shape[2], k.shape[2]
        return Call(
            T=T,
            S=S,
            causal=causal,
            scale=self.scale(scale, q.shape[3]),
            window=window,
            doc_ids=doc_ids,
            first=self.first(offset, T, S),
            query_doc_ids=query_doc_ids,
        )

    def check(self, q: Tensor, k: Tensor, **asked: Any) -> None:
        check_arguments(q, k, **asked)

    def scale(self, scale: float | None, D: int) -> float:
        return D**-0.5 if scale is None else scale

    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T if offset is None else offset

    def load(self, x: Tensor) -> Tensor:
        return x.float()

    def kv_head(self, h: Tensor, H: int, K: int) -> Tensor:
        return h // (H // K)

    # Who sees whom.

    def tiles(self, length: int) -> Iterator[slice]:
        return (slice(i, min(i + self.tile, length)) for i in range(0, length, self.tile))

    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        return self.tiles(call.S)

    def position(self, rows: slice, call: Call) -> Tensor:
        return torch.arange(rows.start, rows.stop) + call.first

    def not_ahead(self, ahead: Tensor) -> Tensor:
        return ahead <= 0

    def in_window(self, behind: Tensor, window: int) -> Tensor:
        return behind < window

    def documents(self, doc_ids: Tensor, rows: slice, call: Call) -> Tensor:
        """Those of the queries: (B, rows)."""
        own = doc_ids[:, call.first :] if call.query_doc_ids is None else call.query_doc_ids
        return own[:, rows]

    def same(self, one: Tensor, other: Tensor) -> Tensor:
        return one == other

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        here = self.position(rows, call)[:, None]
        key = torch.arange(columns.start, columns.stop)
        sees = torch.ones(here.shape[0], len(key), dtype=torch.bool)
        if call.causal:
            sees = sees & self.not_ahead(key - here)
        if call.window is not None:
            sees = sees & self.in_window(here - key, call.window)
        if call.doc_ids is None:
            return sees
        own = self.documents(call.doc_ids, rows, call)
        return (sees & self.same(own[:, :, None], call.doc_ids[:, None, columns]))[:, None]

    def hide(self, logits: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        return logits.masked_fill(~self.sees(rows, columns, call), -torch.inf)

    # Forward.

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return self.product(q, k.mT) * call.scale

    def exp(self, x: Tensor) -> Tensor:
        return x.exp()

    def weights(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """As they meet v."""
        return p.to(dtype).float()

    def highest(self, top: Tensor, logits: Tensor) -> Tensor:
        return torch.maximum(top, logits.amax(-1, keepdim=True))

    def total(self, total: Tensor, shrink: Tensor, p: Tensor, top: Tensor) -> Tensor:
        return total * shrink + p.sum(-1, keepdim=True)

    def gather(self, sums: Tensor, shrink: Tensor, pv: Tensor) -> Tensor:
        return sums * shrink + pv

    def divide(self, sums: Tensor, total: Tensor) -> Tensor:
        return sums / total.masked_fill(total == 0, 1)

    def log_sum(self, top: Tensor, total: Tensor, call: Call) -> Tensor:
        return (top + total.log()).squeeze(-1)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        heads = self.kv_head(torch.arange(q.shape[1]), q.shape[1], k.shape[1])
        queries, keys, values = self.load(q), self.load(k)[:, heads], self.load(v)[:, heads]
        out = self.empty(q.shape, q.dtype)
        lse = self.empty(q.shape[:3], torch.float32)
        for rows in self.tiles(call.T):
            part = queries[:, :, rows]
            top = part.new_full((*part.shape[:3], 1), LOWEST)
            total, sums = torch.zeros_like(top), torch.zeros_like(part)
            for columns in self.key_tiles(rows, call):
                logits = self.logits(part, keys[:, :, columns], call)
                logits = self.hide(logits, rows, columns, call)
                before, top = top, self.highest(top, logits)
                p, shrink = self.exp(logits - top), self.exp(before - top)
                total = self.total(total, shrink, p, top)
                pv = self.product(self.weights(p, q.dtype), values[:, :, columns])
                sums = self.gather(sums, shrink, pv)
            out[:, :, rows] = self.store(self.divide(sums, total), q.dtype)
            lse[:, :, rows] = self.log_sum(top, total, call)
        return out, lse

    # Backward.

    def saved(self, ctx: Any, *tensors: Tensor) -> None:
        ctx.save_for_backward(*tensors)

    def restored(self, ctx: Any) -> tuple[Tensor, ...]:
        return ctx.saved_tensors

    def upstream(self, dout: Tensor) -> Tensor:
        return dout.float()

    def shift(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        """What is subtracted from dP: delta of the flash papers, less the gradient of the lse."""
        return (dout * out.float()).sum(-1, keepdim=True) - dlse[..., None]

    def dlogits(self, p: Tensor, dp: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return (p * (dp - shift)).to(dtype).float()

    def again(self, q: Tensor, k: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        """The logits, made again."""
        return self.hide(self.logits(q, k, call), rows, columns, call)

    def ungroup(self, dheads: Tensor, K: int, dtype: torch.dtype) -> Tensor:
        """The sum over the query heads of a group."""
        B, H, S, D = dheads.shape
        return dheads.view(B, K, H // K, S, D).sum(2).to(dtype)

    def collect(self, sums: Tensor, at: slice, part: Tensor) -> None:
        sums[:, :, at] += part

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor,
        call: Call,
    ) -> tuple[Tensor | None, ...]:
        heads = self.kv_head(torch.arange(q.shape[1]), q.shape[1], k.shape[1])
        queries, keys, values = self.load(q), self.load(k)[:, heads], self.load(v)[:, heads]
        upstream = self.upstream(dout)
        shift = self.shift(upstream, out, dlse)
        floor = lse.clamp(min=LOWEST)[..., None]
        dq, dk, dv = (self.zeros(x) for x in (queries, keys, values))
        for rows in self.tiles(call.T):
            for columns in self.key_tiles(rows, call):
                near, far = queries[:, :, rows], keys[:, :, columns]
                p = (self.again(near, far, rows, columns, call) - floor[:, :, rows]).exp()
                dp = upstream[:, :, rows] @ values[:, :, columns].mT
                dlogits = self.dlogits(p, dp, shift[:, :, rows], q.dtype)
                self.collect(dq, rows, dlogits @ far)
                self.collect(dk, columns, dlogits.mT @ near)
                self.collect(dv, columns, p.to(q.dtype).float().mT @ upstream[:, :, rows])
        K = k.shape[1]
        return (
            self.store(dq * call.scale, q.dtype),
            self.ungroup(dk * call.scale, K, k.dtype),
            self.ungroup(dv, K, v.dtype),
        )

    def zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape)

    def differentiate(self, ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        return self.backward(*self.restored(ctx), dout, dlse, ctx.call)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Flash, call: Call
    ) -> tuple[Tensor, Tensor]:
        out, lse = kernel.forward(q, k, v, call)
        kernel.saved(ctx, q, k, v, out, lse)
        ctx.kernel, ctx.call = kernel, call
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernel.differentiate(ctx, dout, dlse), None, None)


right = Flash()
