"""Embedding and loss where every rank of the tp axis has some tokens of the vocabulary.

The logits, the largest tensor of a training step, are never gathered: of each token the ranks
exchange two numbers, the logarithm of their part of softmax's denominator and the target's logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from picotron_core import ops
from picotron_core.model.embedding import Embed, embed
from picotron_core.ops.comm import Work
from picotron_core.parallel.mesh import Axis

CHUNK_LOGITS = 2**21  # 8 MiB of float32, and there are two chunks at a time


def parallel_embedding(tp: Axis) -> Embed:
    """Rows of the ranks' parts of the table: each rank has its own tokens', and zeros elsewhere.
    Their sum over tp is the embedding.
    """

    def look_up(input_ids: Tensor, weight: Tensor) -> Tensor:
        local = input_ids - tp.index * len(weight)
        mine = (local >= 0) & (local < len(weight))
        found = embed(local.masked_fill(~mine, 0), weight)
        return found.masked_fill(~mine[..., None], 0)

    return look_up


def parallel_loss(tp: Axis, vocab_size: int) -> ops.Loss:
    """The contract of `loss`, where `weight` is this rank's part of the head's rows.

    The gradient of `hidden` is this rank's part of a sum over tp; that sum is the caller's.
    """

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
        if not torch.is_grad_enabled():  # inside a Function one cannot tell that nobody will ask
            hidden, weight = hidden.detach(), weight.detach()
        total: Tensor = VocabularyLoss.apply(  # type: ignore[no-untyped-call]
            hidden, weight, targets, ignore_index, tp, vocab_size
        )
        return total

    return loss


class VocabularyLoss(torch.autograd.Function):
    """Forward: all_gather over tp of two numbers a token; backward: nothing.

    dlogits = softmax(logits) - onehot(target) on each rank's own columns, made in the forward,
    while a chunk's logits are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        tp: Axis,
        vocab_size: int,
    ) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=exact) if wants_weight else None

        def finish(chunk: Chunk) -> Tensor:
            """Its losses' sum; and the gradients, while its logits are at hand."""
            rows, valid = chunk.rows, targets[chunk.rows] != ignore_index
            lse, target = chunk.over_ranks()
            if dhidden is not None or dweight is not None:
                # exp(logits - inf) = 0 drops the ignored rows without another pass.
                dlogits = chunk.logits.sub_(lse.masked_fill(~valid, torch.inf)[:, None]).exp_()
                picked = -(chunk.mine & valid).to(exact)
                dlogits.scatter_add_(1, chunk.local[:, None], picked[:, None])
                if dhidden is not None:
                    dhidden[rows] = dlogits.to(weight.dtype) @ weight
                if dweight is not None:
                    dweight.addmm_(dlogits.T, hidden[rows].to(exact))
            return (lse - target).masked_fill(~valid, 0).sum()

        total = torch.zeros((), dtype=exact, device=hidden.device)
        begun: Chunk | None = None
        size = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            following = Chunk.begin(rows, hidden, weight, targets[rows], tp, vocab_size)
            if begun:  # what the ranks say of it was on its way meanwhile
                total += finish(begun)
            begun = following
        if begun:
            total += finish(begun)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * upstream,
            None if dweight is None else (dweight * upstream).to(ctx.dtype),
            *[None] * 4,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The logits of some tokens, while each rank hears the others' two numbers a token.

    mine: whether the target is among this rank's columns. local: in which one, else 0.
    """

    rows: slice
    logits: Tensor
    mine: Tensor
    local: Tensor
    told: Tensor  # by this rank
    every: Tensor
    work: Work

    @classmethod
    def begin(
        cls,
        rows: slice,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tp: Axis,
        vocab_size: int,
    ) -> Chunk:
        first = tp.index * len(weight)
        local = targets - first
        mine = (local >= 0) & (local < len(weight))
        local = local.masked_fill(~mine, 0)
        logits = F.linear(hidden[rows], weight)
        logits = logits.to(torch.promote_types(weight.dtype, torch.float32))
        if padding := max(0, first + len(weight) - vocab_size):
            logits[:, -padding:] = -torch.inf  # no tokens
        picked = logits.gather(1, local[:, None]).squeeze(1).masked_fill(~mine, 0)
        told = torch.stack([logits.logsumexp(-1), picked])
        every = told.new_empty(tp.size * 2, len(local))
        work = tp.all_gather(every, told, async_op=True)  # all_gather over tp
        return cls(
            rows=rows, logits=logits, mine=mine, local=local, told=told, every=every, work=work
        )

    def over_ranks(self) -> tuple[Tensor, Tensor]:
        """The log of the whole denominator, and the target's logit, which one rank has."""
        self.work.wait()
        lses, logits = self.every.view(-1, 2, len(self.local)).unbind(1)
        return lses.logsumexp(0), logits.sum(0)
