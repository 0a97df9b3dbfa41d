"""Attention block by block, with its own backward: memory grows with T + S, never with T * S.

For each block of queries the keys that it may see are walked in blocks, and an online softmax
(Milakov & Gimelshein 2018, arXiv:1805.02867) keeps per query the highest logit so far, the sum of
p = exp(logit - highest) and the sum of p v. Only q, k, v, out and lse are kept for the backward,
which makes each block's p again (Dao et al. 2022, arXiv:2205.14135, appendix B.4).

The query heads that share a key/value head become rows of one matrix, (B * K, H / K * block, D), so
K and V are never expanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picotron_backends.mem_efficient.blockmask import BlockMask

# Measured on CPU at S = 512 and 2048: a block of logits stays in cache, and the matrix products
# still outweigh the calls.
QUERY_BLOCK = 128
KEY_BLOCK = 256


def blockwise(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the contract; both can be differentiated, and lse is float64 where q is."""
    out, lse = Blockwise.apply(q, k, v, mask, scale)  # type: ignore[no-untyped-call]
    return out, lse


class Blockwise(torch.autograd.Function):
    """With P = exp(logits - lse) and dP = dout v^T:  dlogits = P (dP - rowsum(dout out) + dlse)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        groups = q.shape[1] // k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=exact, device=q.device)
        for rows in _blocks(0, q.shape[2], QUERY_BLOCK):
            queries = _grouped(q[:, :, rows], groups).to(exact) * scale
            # Not -inf: in a row that sees nothing, -inf - -inf would be NaN.
            highest = queries.new_full((*queries.shape[:2], 1), torch.finfo(exact).min)
            total = torch.zeros_like(highest)
            weighted = torch.zeros_like(queries)
            for columns in _blocks(*mask.reach(rows), KEY_BLOCK):
                p = queries @ keys[:, columns].to(exact).mT
                mask.hide(p, rows, columns)
                before, highest = highest, torch.maximum(highest, p.amax(-1, keepdim=True))
                p.sub_(highest).exp_()
                shrink = before.sub_(highest).exp_()
                total.mul_(shrink).add_(p.sum(-1, keepdim=True))
                weighted.mul_(shrink).baddbmm_(p, values[:, columns].to(exact))
            _ungroup(weighted.div_(total.masked_fill(total == 0, 1)), out[:, :, rows])
            _ungroup(highest.add_(total.log()), lse[:, :, rows])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale = mask, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        mask: BlockMask = ctx.mask
        exact = lse.dtype
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        groups = q.shape[1] // k.shape[1]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dkeys = torch.zeros(keys.shape, dtype=exact, device=q.device)
        dvalues = torch.zeros_like(dkeys)
        for rows in _blocks(0, q.shape[2], QUERY_BLOCK):
            queries = _grouped(q[:, :, rows], groups).to(exact) * ctx.scale
            upstream = _grouped(dout[:, :, rows], groups).to(exact)
            lse_rows = _grouped(lse[:, :, rows, None], groups).clamp(min=torch.finfo(exact).min)
            shift = (upstream * _grouped(out[:, :, rows], groups)).sum(-1, keepdim=True)
            shift -= _grouped(dlse[:, :, rows, None], groups)
            dqueries = torch.zeros_like(queries)
            for columns in _blocks(*mask.reach(rows), KEY_BLOCK):
                seen_keys = keys[:, columns].to(exact)
                p = queries @ seen_keys.mT
                mask.hide(p, rows, columns)
                p.sub_(lse_rows).exp_()
                dvalues[:, columns].baddbmm_(p.mT, upstream)
                dp = upstream @ values[:, columns].to(exact).mT
                dlogits = dp.sub_(shift).mul_(p)
                dqueries.baddbmm_(dlogits, seen_keys)
                dkeys[:, columns].baddbmm_(dlogits.mT, queries)
            _ungroup(dqueries.mul_(ctx.scale), dq[:, :, rows])
        return dq, dkeys.view(k.shape).to(k.dtype), dvalues.view(v.shape).to(v.dtype), None, None


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """(B, K * groups, rows, n) -> (B * K, groups * rows, n)."""
    B, H, rows, n = heads.shape
    return heads.reshape(B * (H // groups), groups * rows, n)


def _ungroup(grouped: Tensor, heads: Tensor) -> None:
    """Write `_grouped` values back to their heads; (B, H, rows) takes those of n = 1."""
    heads.copy_(grouped.view(heads.shape))
