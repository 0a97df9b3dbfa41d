"""What each op must compute, in float64: the judge of every backend, `naive-math` included.

An oracle is written from the contract alone and shares no code with any backend or with the
contract's own `visible`, so that a mistake would have to be made twice, in two ways. It is slow and
small on purpose: loops over queries and tokens, explicit sets of keys, one case at a time. All but
`adamw` can be differentiated, so autograd gives the oracle's gradients.

Arguments are those of the contracts in `picotron_core.ops`. Every floating input is lifted to
float64 first: hand it the very values that the kernel got, after their rounding to 16 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def seen_keys(
    t: int,
    *,
    T: int,
    S: int,
    causal: bool,
    window: int | None,
    documents: list[int] | None,
    offset: int | None = None,
    query_documents: list[int] | None = None,
) -> list[int]:
    """The keys that query t sees, in one sequence whose keys belong to `documents`."""
    here = t + (S - T) if offset is None else t + offset
    if documents is None:
        alike = set(range(S))
    else:
        mine = documents[here] if query_documents is None else query_documents[t]
        alike = {s for s, document in enumerate(documents) if document == mine}
    return [
        s
        for s in range(S)
        if s in alike
        and not (causal and s > here)
        and not (window is not None and here - s >= window)
    ]


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
) -> tuple[Tensor, Tensor]:
    """(out (B, H, T, D), lse (B, H, T)), query by query."""
    q, k, v = q.double(), k.double(), v.double()
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    scale = 1 / math.sqrt(D) if scale is None else scale
    out, lse = [], []
    for b in range(B):
        documents = None if doc_ids is None else doc_ids[b].tolist()
        query_documents = None if query_doc_ids is None else query_doc_ids[b].tolist()
        for h in range(H):
            keys, values = k[b, h * K // H], v[b, h * K // H]
            for t in range(T):
                seen = seen_keys(
                    t,
                    T=T,
                    S=S,
                    causal=causal,
                    window=window,
                    documents=documents,
                    offset=offset,
                    query_documents=query_documents,
                )
                if not seen:
                    out.append(q.new_zeros(D))
                    lse.append(q.new_tensor(-math.inf))
                    continue
                logits = torch.einsum("sd,d->s", keys[seen], q[b, h, t]) * scale
                top = logits.detach().max()
                normaliser = (logits - top).exp().sum()
                out.append(((logits - top).exp() / normaliser) @ values[seen])
                lse.append(top + normaliser.log())
    return torch.stack(out).reshape(B, H, T, D), torch.stack(lse).reshape(B, H, T)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Divide by the length of each vector over sqrt(E), eps inside the root."""
    x = x.double()
    power = torch.einsum("...e,...e->...", x, x) / x.shape[-1]
    return x / (power + eps).sqrt()[..., None] * weight.double()


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A pair (x[i], x[i + D/2]) is a complex number; turning it is one multiplication."""
    turn = torch.complex(cos.double(), sin.double())
    if turn.dim() == 3:  # (B, T, D/2): positions of their own for each sequence
        turn = turn[:, None]

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate times up over 1 + exp(-gate)."""
    return gate.double() * up.double() / (1 + torch.exp(-gate.double()))


def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    """Token by token: the log of the sum of exp(logit - logit of the target)."""
    hidden, weight = hidden.double(), weight.double()
    total = (hidden.sum() + weight.sum()) * 0  # so that there is a gradient, zero, of no token
    for h, target in zip(hidden, targets.tolist(), strict=True):
        if target == ignore_index:
            continue
        beyond = weight @ h - weight[target] @ h
        top = beyond.detach().max()
        total = total + top + (beyond - top).exp().sum().log()
    return total


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next (param, exp_avg, exp_avg_sq) of one parameter, as new tensors."""
    param, grad, exp_avg, exp_avg_sq = (
        tensor.double() for tensor in (param, grad, exp_avg, exp_avg_sq)
    )
    exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq + (1 - beta2) * (grad**2 - exp_avg_sq)
    direction = (exp_avg / (1 - beta1**step)) / (torch.sqrt(exp_avg_sq / (1 - beta2**step)) + eps)
    return param - lr * (weight_decay * param + direction), exp_avg, exp_avg_sq
