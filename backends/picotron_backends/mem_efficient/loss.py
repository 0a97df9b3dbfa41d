"""Head and cross-entropy in chunks of tokens: the (N, V) logits are never there at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**22  # 16 MiB of float32


def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    """Makes the gradients in the forward, while a chunk's logits are at hand."""
    if not torch.is_grad_enabled():  # inside a Function one cannot tell that nobody will ask
        hidden, weight = hidden.detach(), weight.detach()
    total: Tensor = ChunkedLoss.apply(hidden, weight, targets, ignore_index)  # type: ignore[no-untyped-call]
    return total


def chunk_rows(*, N: int, E: int, V: int) -> int:
    """As many tokens as keep the logits small: CHUNK_LOGITS of them, or with a large V half as many
    as the weight's gradient has numbers, but never all N.

    Each chunk reads all of W and writes all of dW: fewer rows were up to twice as slow (CPU).
    """
    return min(max(1, CHUNK_LOGITS // V, min(N, E) // 2), max(1, (N + 1) // 2))


class ChunkedLoss(torch.autograd.Function):
    """dlogits = softmax(logits) - onehot(target);  dhidden = dlogits W;  dW = dlogits^T hidden."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        # A sum over many chunks: in 16 bits each product and each addition would round.
        dweight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        (N, E), V = hidden.shape, len(weight)
        size = chunk_rows(N=N, E=E, V=V)
        for rows in (slice(i, i + size) for i in range(0, N, size)):
            valid = targets[rows] != ignore_index
            target = targets[rows].masked_fill(~valid, 0)
            row = torch.arange(len(target), device=hidden.device)
            logits = (hidden[rows] @ weight.T).to(exact)
            lse = logits.logsumexp(-1)
            total += (lse - logits[row, target]).masked_fill(~valid, 0).sum()
            if dhidden is None and dweight is None:
                continue
            # exp(logits - inf) = 0 drops the ignored rows without another pass.
            dlogits = logits.sub_(lse.masked_fill(~valid, torch.inf)[:, None]).exp_()
            dlogits[row, target] -= valid.to(exact)
            dlogits = dlogits.to(weight.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[rows])
            if dweight is not None:
                _add_product(dweight, dlogits.T, hidden[rows])
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * upstream,
            None if dweight is None else (dweight * upstream).to(ctx.dtype),
            None,
            None,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in total's dtype throughout, by tensor cores where torch can ask for that."""
    if total.is_cuda and a.dtype != total.dtype and hasattr(torch.ops.aten.mm, "dtype"):
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
