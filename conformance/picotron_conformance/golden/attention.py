"""Attention, with the roundings that its contract permits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from picotron_conformance.rounding import EXACT, TRANSCENDENTAL, Rounding

Named = dict[str, Tensor]


def attention(
    tensors: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    offset: int | None = None,
    at: Rounding = EXACT,
) -> Named:
    """out, lse; with upstream also dq, dk, dv.

    tensors: q (B, H, T, D), k and v (B, K, S, D), perhaps doc_ids (B, S), query_doc_ids (B, T).
    upstream: "out" and perhaps "lse"; empty for the forward alone.
    """
    q, k, v = (tensors[name].double() for name in "qkv")
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(D) if scale is None else scale
    # A constant in float32 (for exp2 with log2(e) in it) errs alike for all logits.
    factor = at.float32(torch.tensor(scale, dtype=torch.float64), units=2)
    first = S - T if offset is None else offset
    documents = tensors.get("doc_ids"), tensors.get("query_doc_ids")
    hidden = ~_sees(T, S, first, causal=causal, window=window, documents=documents)
    group = torch.arange(H) // (H // K)  # the key/value head of each query head
    keys, values = k[:, group], v[:, group]

    def logits_of() -> Tensor:
        # The product, then scaled (or q before it), and for exp2 times log2(e): a rounding each.
        logits = at.wide(at.wide(at.matmul(q, keys.mT)) * factor, units=2)
        return logits.masked_fill(hidden, -math.inf)

    logits = logits_of()
    top = logits.amax(-1, keepdim=True) if S else logits.new_full((B, H, T, 1), -math.inf)
    top = at.shift(top.masked_fill(top == -math.inf, 0))  # 0 in a row that sees nothing
    weights = at.float32((logits - top).exp(), units=TRANSCENDENTAL)
    total = at.sum(weights, -1, keepdim=True)
    lse = at.float32(total.log() + top, units=2)
    weights = weights / total.masked_fill(total == 0, 1)
    # A kernel may share out the keys, and weigh each part's result by its lse: split-K, a ring.
    for part in (slice(0, S // 2), slice(S // 2, S)):
        own = logits[..., part].logsumexp(-1, keepdim=True)
        weights[..., part] *= (at.float32(own, units=2) - own).nan_to_num(0, 0, 0).exp()
    p = at.stored(weights)
    out = at.stored(at.matmul(p, values))
    results = {"out": out, "lse": lse.squeeze(-1)}
    if not upstream:
        return results

    dout = upstream["out"].double() if "out" in upstream else torch.zeros_like(out)
    # Of the kernel's own rounded output, as flash kernels take it (arXiv:2205.14135 appendix B.4).
    delta = at.sum(dout * out, -1, keepdim=True)
    if "lse" in upstream:
        delta = delta - upstream["lse"].double().masked_fill(hidden.all(-1), 0)[..., None]
    # A kernel that kept no weights makes them again, of other sums and of the rounded lse.
    again = at.float32(lse.masked_fill(lse == -math.inf, 0))
    p = at.stored(at.float32((logits_of() - again).exp(), units=TRANSCENDENTAL))
    dp = at.wide(at.matmul(dout, values.mT))
    dlogits = at.stored(p * (dp - delta))
    dq = at.stored(at.matmul(dlogits, keys) * scale)
    dkeys = at.matmul(dlogits.mT, q) * scale
    dvalues = at.matmul(p.mT, dout)
    # Each head of a group may be rounded once before they add up, not after each addition.
    dk = at.stored(at.sum(at.stored(dkeys).reshape(B, K, H // K, S, D), 2))
    dv = at.stored(at.sum(at.stored(dvalues).reshape(B, K, H // K, S, D), 2))
    return results | {"dq": dq, "dk": dk, "dv": dv}


def _sees(
    T: int,
    S: int,
    first: int,
    *,
    causal: bool,
    window: int | None,
    documents: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Bool (1 or B, 1, T, S): whether the key is near enough, not ahead, and of one document.

    first: the position of query 0. documents: of the keys and of the queries.
    """
    ahead = torch.arange(S)[None, :] - (torch.arange(T) + first)[:, None]  # key minus query
    sees = (ahead <= 0) if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        sees = sees & (-ahead < window)
    theirs, own = documents
    if theirs is None:
        return sees[None, None]
    own = theirs[:, first : first + T] if own is None else own
    return (sees & own.unsqueeze(2).eq(theirs.unsqueeze(1)))[:, None]
