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

    Query head h reads key/value head h // (H // K). Query t stands at position S - T + t, so the
    last query sees the last key (causal is aligned bottom-right when T != S).

    Args:
        q: (B, H, T, D) float; any strides.
        k, v: (B, K, S, D), dtype and device of q.
        causal: a query sees only keys at or before its own position.
        scale: factor on the logits; None means 1 / sqrt(D).
        window: how many latest keys a query sees, itself included; >= 1, needs `causal`.
        doc_ids: (B, S) integers; a query sees only keys with its own position's id; needs T <= S.
        return_lse: also return the log-sum-exp of the scaled, visible logits.

    Returns:
        (B, H, T, D), dtype of q. With `return_lse` also (B, H, T) float32, natural log; whether it
        can be differentiated is a claim of the backend (feature `lse_backward`).
        A query that sees nothing has output 0 and lse -inf, and sends no gradient anywhere.

    Raises: ValueError for a window below 1 or without `causal`, for doc_ids with T > S or not of
        shape (B, S), and where K does not divide H.
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
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...


# What a request for attention can ask for beyond full, ungrouped, T == S attention.
FEATURES = ("causal", "gqa", "window", "doc_ids", "cross_length", "lse", "lse_backward")


def check_arguments(
    q: Tensor, k: Tensor, *, causal: bool, window: int | None, doc_ids: Tensor | None
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
    if doc_ids is not None and (T > S or doc_ids.shape != (B, S)):
        raise ValueError(
            f"doc_ids of shape {tuple(doc_ids.shape)} must name the documents of B={B} rows of "
            f"S={S} keys, and of T={T} <= S queries"
        )


def visible(
    *,
    T: int,
    S: int,
    causal: bool,
    window: int | None,
    doc_ids: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query sees: bool (1 or B, 1, T, S), the contract's definition of the mask."""
    position = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    sees = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        sees = sees & (key <= position)
    if window is not None:
        sees = sees & (key > position - window)
    if doc_ids is None:
        return sees[None, None]
    same = doc_ids[:, S - T :, None] == doc_ids[:, None, :]
    return (sees & same)[:, None]
