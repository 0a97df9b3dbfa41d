"""Right losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Tiles(torch.autograd.Function):
    """logsumexp over tiles of the vocabulary; the backward makes each tile of logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
    ) -> Tensor:
        valid = targets != ignore_index
        labels = targets.masked_fill(~valid, 0)
        top = torch.full((len(hidden), 1), torch.finfo(torch.float32).min)
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        for start in range(0, len(weight), 16):
            logits = (hidden @ weight[start : start + 16].T).float()
            before, top = top, torch.maximum(top, logits.amax(-1, keepdim=True))
            total = total * (before - top).exp() + (logits - top).exp().sum(-1, keepdim=True)
            here = (labels - start)[:, None] == torch.arange(logits.shape[1])
            picked = picked + torch.where(here, logits, 0.0).sum(-1, keepdim=True)
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, labels, valid, lse)
        return torch.where(valid[:, None], lse - picked, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, valid, lse = ctx.saved_tensors
        dhidden, dweight = torch.zeros(hidden.shape), torch.empty_like(weight)
        for start in range(0, len(weight), 16):
            rows = weight[start : start + 16]
            p = ((hidden @ rows.T).float() - lse).exp()
            here = (labels - start)[:, None] == torch.arange(len(rows))
            dlogits = torch.where(valid[:, None], (p - here.float()) * dloss, 0.0).to(weight.dtype)
            dhidden += dlogits.float() @ rows.float()
            dweight[start : start + 16] = dlogits.T @ hidden
        return dhidden.to(hidden.dtype), dweight, None, None


def vocabulary_tiles(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    total: Tensor = _Tiles.apply(hidden, weight, targets, ignore_index)
    return total


class _Chunks(torch.autograd.Function):
    """Gradients for an upstream of 1, made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
    ) -> Tensor:
        total, dweight = torch.zeros(()), torch.zeros(weight.shape)
        dhidden = torch.empty_like(hidden)
        for start in range(0, len(hidden), 8):
            rows = slice(start, start + 8)
            valid = (targets[rows] != ignore_index)[:, None]
            labels = targets[rows, None].masked_fill(~valid, 0)
            logits = (hidden[rows] @ weight.T).float()
            logp = logits.log_softmax(-1)
            total = total - torch.where(valid, logp.gather(-1, labels), 0.0).sum()
            dlogits = logp.exp().scatter_add(-1, labels, -torch.ones(len(labels), 1))
            dlogits = torch.where(valid, dlogits, 0.0).to(weight.dtype)
            dhidden[rows] = dlogits @ weight
            dweight += dlogits.float().T @ hidden[rows].float()
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dloss, (dweight * dloss).to(dhidden.dtype), None, None


def gradient_in_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    total: Tensor = _Chunks.apply(hidden, weight, targets, ignore_index)
    return total


def logits_in_float32(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    return torch.nn.functional.cross_entropy(
        hidden.float() @ weight.float().T, targets, ignore_index=ignore_index, reduction="sum"
    )


def target_apart(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    exact_hidden, exact_weight = hidden.float(), weight.float()
    valid = targets != ignore_index
    picked = (exact_hidden * exact_weight[targets.masked_fill(~valid, 0)]).sum(-1)
    lse = (exact_hidden @ exact_weight.T).logsumexp(-1)
    return (lse - picked).masked_fill(~valid, 0).sum()


class _UpstreamFirst(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
    ) -> Tensor:
        logits = hidden @ weight.T
        lse = logits.float().logsumexp(-1, keepdim=True)
        valid = (targets != ignore_index)[:, None]
        labels = targets[:, None].masked_fill(~valid, 0)
        ctx.save_for_backward(hidden, weight, logits, lse, labels, valid)
        return torch.where(valid, lse - logits.float().gather(-1, labels), 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, logits, lse, labels, valid = ctx.saved_tensors
        p = (logits.float() - lse).exp()
        p = p.scatter_add(-1, labels, -torch.ones(len(labels), 1))
        dlogits = torch.where(valid, p * dloss, 0.0).to(weight.dtype)
        return dlogits @ weight, dlogits.T @ hidden, None, None


def upstream_first(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    total: Tensor = _UpstreamFirst.apply(hidden, weight, targets, ignore_index)
    return total


def valid_tokens_alone(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    logits = (hidden[rows] @ weight.T).float()
    picked = logits.gather(-1, targets[rows, None]).squeeze(-1)
    return (logits.logsumexp(-1) - picked).sum()


def double_precision(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    logits = hidden.double() @ weight.double().T
    valid = targets != ignore_index
    picked = logits.gather(-1, targets.masked_fill(~valid, 0)[:, None]).squeeze(-1)
    return (logits.logsumexp(-1) - picked).masked_fill(~valid, 0).sum().float()
