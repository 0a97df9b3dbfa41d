"""Attention as its equations are written: the whole (T, S) matrix of logits, then of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from picotron_core.ops.attention import check_arguments, visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    offset: int | None = None,
    query_doc_ids: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """O(T * S) memory; its lse can be differentiated."""
    (T, D), S = q.shape[2:], k.shape[2]
    check_arguments(
        q,
        k,
        causal=causal,
        window=window,
        doc_ids=doc_ids,
        offset=offset,
        query_doc_ids=query_doc_ids,
    )
    scale = D**-0.5 if scale is None else scale
    sees = visible(
        T=T,
        S=S,
        causal=causal,
        window=window,
        doc_ids=doc_ids,
        offset=offset,
        query_doc_ids=query_doc_ids,
        device=q.device,
    )

    exact = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    keys = k.to(exact).repeat_interleave(groups, dim=1)
    values = v.to(exact).repeat_interleave(groups, dim=1)

    logits = (scale * q.to(exact) @ keys.mT).masked_fill(~sees, -torch.inf)
    # softmax over no key at all is 0 / 0; what nobody sees has weight 0
    weights = logits.softmax(dim=-1).masked_fill(~sees, 0)
    out = (weights @ values).to(q.dtype)
    return (out, logits.logsumexp(dim=-1)) if return_lse else out
