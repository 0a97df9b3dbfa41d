"""Attention by torch.nn.functional.scaled_dot_product_attention, which picks its own kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from picotron_backends.sdpa.flash_rules import expands_kv
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
) -> Tensor:
    """Offers no lse. A window, documents, an offset, causal with 1 < T != S: an O(T * S) mask.

    Raises: ValueError for return_lse, and where the contract does.
    """
    if return_lse:
        raise ValueError("sdpa cannot return the lse: take attention=mem_efficient or naive-math")
    T, S = q.shape[2], k.shape[2]
    check_arguments(
        q,
        k,
        causal=causal,
        window=window,
        doc_ids=doc_ids,
        offset=offset,
        query_doc_ids=query_doc_ids,
    )
    mask = None
    placed = causal and (offset is not None or T not in (1, S))
    if window is not None or doc_ids is not None or placed:
        # torch aligns is_causal top-left, so any other alignment is spelt out
        mask = visible(
            T=T,
            S=S,
            causal=causal,
            window=window,
            doc_ids=doc_ids,
            device=q.device,
            offset=offset,
            query_doc_ids=query_doc_ids,
        )
    if scale is not None and scale <= 0:  # torch's CPU kernel scales its running -inf: NaN
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    dtype = q.dtype
    if q.device.type == "cpu" and dtype.itemsize == 2 and torch.is_grad_enabled():
        # torch's CPU kernel adds up dk and dv in the inputs' dtype, rounding at every block of
        # queries and at every head of a group: 6e-3 off at T = 4096, where 2e-3 is the rounding.
        q, k, v = q.float(), k.float(), v.float()
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and expands_kv(
        device_type=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
        dtype=str(q.dtype).removeprefix("torch."),
        D=q.shape[3],
        masked=mask is not None,
    ):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        groups = 1
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None and T == S,
        scale=scale,
        enable_gqa=groups > 1,
    )
    return out.to(dtype)
