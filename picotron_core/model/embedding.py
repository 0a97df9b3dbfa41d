"""The look-up of token embeddings, with a gradient that sums in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Embed = Callable[[Tensor, Tensor], Tensor]  # (input_ids, weight) -> hidden states


def embed(input_ids: Tensor, weight: Tensor) -> Tensor:
    """Row `input_ids[b, t]` of weight (V, E): (B, T) -> (B, T, E).

    On a CPU torch adds the gradients of a row up in the weight's dtype: in bfloat16 a token that
    is met 1000 times in a batch would end at the gradient of its first 256.
    """
    if weight.dtype == torch.float32:
        return F.embedding(input_ids, weight)
    found: Tensor = Lookup.apply(input_ids, weight)  # type: ignore[no-untyped-call]
    return found


class Lookup(torch.autograd.Function):
    """dweight[v] = the sum of dout[b, t] over all places where input_ids[b, t] = v."""

    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(input_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:
        (input_ids,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=dout.device)
        total.index_add_(0, input_ids.flatten(), dout.flatten(0, -2).float())
        return None, total.to(ctx.dtype)
