"""Attention in O(T + S) memory: torch's memory-efficient CUDA kernel, else block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from picotron_backends.mem_efficient.blockmask import BlockMask
from picotron_backends.mem_efficient.blockwise import blockwise
from picotron_backends.mem_efficient.pinned_rules import pinned_serves
from picotron_core.ops.attention import check_arguments


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
    """Differs from the reference in memory alone; its lse can be differentiated."""
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
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
    if pinned_serves(
        device_type=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
        dtype=str(q.dtype).removeprefix("torch."),
        D=D,
        same_length=T == S,
        masked=window is not None or doc_ids is not None or offset is not None,
        lse=return_lse,
    ):
        return _pinned(q, k, v, causal=causal, scale=scale)
    mask = BlockMask(
        S=S,
        first=S - T if offset is None else offset,
        causal=causal,
        window=window,
        doc_ids=doc_ids,
        query_doc_ids=query_doc_ids,
    )
    out, lse = blockwise(q, k, v, mask, scale=scale)
    return (out, lse) if return_lse else out


def _pinned(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One kernel or an error: where it cannot run, torch must not take its O(T * S) one instead."""
    # It knows no groups, and reads rows of D values that lie side by side.
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
