"""The contract of `attention`.

Shape legend of the whole project: B batch, T query tokens, S key tokens, H query heads,
K key/value heads (divides H), D head dim, E model dim, V vocabulary, N tokens in a flat list.
"""

from __future__ import annotations

from typing import Literal, Protocol, overload

import torch
from torch import Tensor


class Attention(Protocol):
    """out = softmax(scale * q k^T, over the keys a query sees) v, head by head.

    Query head h reads key/value head h // (H // K). Query t stands at position offset + t
    among the keys. offset is S - T unless it is given, so that the last query stands at the last
    key (causal is aligned bottom-right when T != S).

    Args:
        q: (B, H, T, D) float; any strides.
        k, v: (B, K, S, D), dtype and device of q.
        causal: a query sees only keys at or before its own position.
        scale: factor on the logits; None means 1 / sqrt(D).
        window: how many latest keys a query sees, itself included; >= 1, needs `causal`.
        doc_ids: (B, S) integers, the keys' documents; a query sees only keys of its own.
        offset: the first query's position; it may stand before the keys, or beyond them.
        query_doc_ids: (B, T), dtype of doc_ids: the queries' documents; None takes those at their
            positions, which must then be among the keys'.
        return_lse: also return the log-sum-exp of the scaled, visible logits.

    Returns:
        (B, H, T, D), dtype of q. With `return_lse` also (B, H, T) float32, natural log; whether it
        can be differentiated is a claim of the backend (feature `lse_backward`).
        A query that sees nothing has output 0 and lse -inf, and sends no gradient anywhere.

    Raises: ValueError for a window below 1 or without `causal`, for doc_ids not of shape (B, S),
        or without query_doc_ids where a query is not at a key's position, for query_doc_ids not of
        shape (B, T) or without doc_ids, and where K does not divide H.
    Numerics: logits, softmax and sums in float32 or better.
    Source: Vaswani et al. 2017 (arXiv:1706.03762) eq. 1; Ainslie et al. 2023 (arXiv:2305.13245)
        for grouped heads; Dao et al. 2022 (arXiv:2205.14135) section 3.1 for the lse.
    """

    @overload
    def __call__(
        self,
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
        return_lse: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
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
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...


# What a request for attention can ask for beyond full, ungrouped, T == S attention.
FEATURES = (
    "causal",
    "gqa",
    "window",
    "doc_ids",
    "cross_length",
    "offset",
    "query_doc_ids",
    "lse",
    "lse_backward",
)


def check_arguments(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    window: int | None,
    doc_ids: Tensor | None,
    offset: int | None = None,
    query_doc_ids: Tensor | None = None,
) -> None:
    """Raise the contract's ValueErrors; every backend calls it first."""
    (B, H, T), (K, S) = q.shape[:3], k.shape[1:3]
    if H % K:
        raise ValueError(f"H={H} query heads cannot share K={K} key/value heads evenly")
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"window={window} with causal={causal}: a window counts the latest keys, so it needs "
            "window >= 1 and causal=True"
        )
    if doc_ids is not None and doc_ids.shape != (B, S):
        raise ValueError(
            f"doc_ids of shape {tuple(doc_ids.shape)} must name the documents of B={B} rows of "
            f"S={S} keys"
        )
    if query_doc_ids is not None:
        if doc_ids is None or query_doc_ids.shape != (B, T):
            raise ValueError(
                f"query_doc_ids of shape {tuple(query_doc_ids.shape)} must name the documents of "
                f"B={B} rows of T={T} queries, beside the keys' doc_ids"
            )
    elif doc_ids is not None:
        first = S - T if offset is None else offset
        if first < 0 or first + T > S:
            raise ValueError(
                f"T={T} queries from position {first} on are not all among the S={S} keys whose "
                "documents doc_ids names: give query_doc_ids"
            )


def visible(
    *,
    T: int,
    S: int,
    causal: bool,
    window: int | None,
    doc_ids: Tensor | None,
    device: torch.device,
    offset: int | None = None,
    query_doc_ids: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: bool (1 or B, 1, T, S), the contract's definition of the mask."""
    first = S - T if offset is None else offset
    position = torch.arange(first, first + T, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    sees = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        sees = sees & (key <= position)
    if window is not None:
        sees = sees & (position - key < window)  # the difference cannot overflow
    if doc_ids is None:
        return sees[None, None]
    own = doc_ids[:, first : first + T] if query_doc_ids is None else query_doc_ids
    same = own[:, :, None] == doc_ids[:, None, :]
    return (sees & same)[:, None]
