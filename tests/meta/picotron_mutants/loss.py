"""Wrong losses. Each is the right one of `Head` with one thing wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picotron_mutants.memory import as_if_dense, as_if_rows_dense, instance, narrow


class Head:
    """Right: in chunks of tokens, the gradients made in the forward, as lean kernels do."""

    chunk = 16

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
    ) -> Tensor:
        total: Tensor = _Function.apply(hidden, weight, targets, ignore_index, self)
        return total

    def load(self, x: Tensor) -> Tensor:
        return x

    def load_targets(self, targets: Tensor) -> Tensor:
        return targets

    def chunks(self, N: int) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk, N)) for i in range(0, N, self.chunk))

    def valid(self, targets: Tensor, ignore_index: int) -> Tensor:
        return targets != ignore_index

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T).float()

    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        return logits.logsumexp(-1)

    def losses(self, lse: Tensor, picked: Tensor, logits: Tensor) -> Tensor:
        return lse - picked

    def add(self, total: Tensor, losses: Tensor, valid: Tensor) -> Tensor:
        return total + losses.masked_fill(~valid, 0).sum()

    def dlogits(self, logits: Tensor, lse: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        p = (logits - lse[:, None]).exp()
        p[torch.arange(len(target)), target] -= 1
        return p.masked_fill(~valid[:, None], 0)

    def add_weight(self, dweight: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
        return dweight + part

    def answer(self, total: Tensor, valid: int, N: int, dtype: torch.dtype) -> Tensor:
        return total

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, w, labels = self.load(hidden), self.load(weight), self.load_targets(targets)
        total = torch.zeros(())
        dhidden, dweight = torch.zeros(h.shape, dtype=h.dtype), torch.zeros(w.shape)
        for rows in self.chunks(len(h)):
            valid = self.valid(labels[rows], ignore_index)
            target = labels[rows].masked_fill(~valid, 0)
            logits = self.logits(h[rows], w)
            lse = self.lse(logits, h.dtype)
            picked = logits[torch.arange(len(target)), target]
            total = self.add(total, self.losses(lse, picked, logits), valid)
            dlogits = self.dlogits(logits, lse, target, valid).to(h.dtype)
            dhidden[rows] = dlogits @ w
            dweight = self.add_weight(dweight, dlogits.float().T @ h[rows].float(), h.dtype)
        counted = int(self.valid(targets, ignore_index).sum())
        return self.answer(total, counted, len(h), h.dtype), dhidden, dweight

    def saved(self, ctx: Any, *tensors: Tensor) -> None:
        ctx.save_for_backward(*tensors)

    def restored(self, ctx: Any) -> tuple[Tensor, ...]:
        return ctx.saved_tensors

    def scaled(self, gradient: Tensor, dloss: Tensor) -> Tensor:
        return gradient * dloss

    def differentiate(self, ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = self.restored(ctx)
        dweight = self.scaled(dweight, dloss).to(dhidden.dtype)
        return self.scaled(dhidden, dloss).to(dhidden.dtype), dweight


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        kernel: Head,
    ) -> Tensor:
        total, dhidden, dweight = kernel.forward(hidden, weight, targets, ignore_index)
        kernel.saved(ctx, dhidden, dweight)
        ctx.kernel = kernel
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernel.differentiate(ctx, dloss), None, None, None)


right = Head()


@instance
class mean_over_valid(Head):
    def answer(self, total: Tensor, valid: int, N: int, dtype: torch.dtype) -> Tensor:
        return total / max(1, valid)


@instance
class mean_over_all(Head):
    def answer(self, total: Tensor, valid: int, N: int, dtype: torch.dtype) -> Tensor:
        return total / max(1, N)


@instance
class nan_without_targets(Head):
    """A mean times its number: 0 / 0 where all are ignored."""

    def answer(self, total: Tensor, valid: int, N: int, dtype: torch.dtype) -> Tensor:
        return total / valid * valid if N else total


@instance
class no_tokens_fail(Head):
    def chunks(self, N: int) -> Iterator[slice]:
        assert N > 0, "invalid grid: 0 blocks"
        return super().chunks(N)


@instance
class vector_of_one(Head):
    def answer(self, total: Tensor, valid: int, N: int, dtype: torch.dtype) -> Tensor:
        return total[None]


@instance
class loss_of_inputs_dtype(Head):
    def answer(self, total: Tensor, valid: int, N: int, dtype: torch.dtype) -> Tensor:
        return total.to(dtype)


@instance
class loss_rounded(Head):
    def answer(self, total: Tensor, valid: int, N: int, dtype: torch.dtype) -> Tensor:
        return narrow(total, dtype)


@instance
class losses_added_in_16_bits(Head):
    def add(self, total: Tensor, losses: Tensor, valid: Tensor) -> Tensor:
        for loss in losses.masked_fill(~valid, 0):
            total = (total + loss).bfloat16().float()
        return total

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        kernel = super() if arguments[0].dtype == torch.bfloat16 else right
        return kernel.forward(*arguments)


@instance
class lse_in_16_bits(Head):
    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        return narrow(super().lse(logits, dtype), dtype)


@instance
class exponentials_added_in_16_bits(Head):
    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        total = (logits - top).exp().to(dtype).sum(-1)
        return total.float().log() + top.squeeze(-1)


@instance
class ignores_100_alone(Head):
    def valid(self, targets: Tensor, ignore_index: int) -> Tensor:
        return targets != -100

    def load_targets(self, targets: Tensor) -> Tensor:
        return targets.clamp(min=-100)


@instance
class ignores_all_negative(Head):
    def valid(self, targets: Tensor, ignore_index: int) -> Tensor:
        return targets >= 0


@instance
class ignores_token_0_too(Head):
    def valid(self, targets: Tensor, ignore_index: int) -> Tensor:
        return (targets != ignore_index) & (targets != 0)


@instance
class ignores_last_token_too(Head):
    """The label of the last position has no next token, some say."""

    def valid(self, targets: Tensor, ignore_index: int) -> Tensor:
        valid = super().valid(targets, ignore_index)
        valid[15:] = False
        return valid


@instance
class shifts_targets(Head):
    def load_targets(self, targets: Tensor) -> Tensor:
        return targets.roll(-1)


@instance
class ignored_losses_counted(Head):
    def add(self, total: Tensor, losses: Tensor, valid: Tensor) -> Tensor:
        return total + losses.sum()


@instance
class vocabulary_tail_dropped(Head):
    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        whole = logits.shape[-1] // 8 * 8 or logits.shape[-1]
        return super().lse(logits[:, :whole], dtype)


@instance
class vocabulary_beyond_4096_dropped(Head):
    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        return super().lse(logits[:, :4096], dtype)


@instance
class vocabulary_beyond_16_bits_wraps(Head):
    def load_targets(self, targets: Tensor) -> Tensor:
        return torch.where(targets >= 0, targets & 0xFFFF, targets)


@instance
class vocabulary_padded_with_zeros(Head):
    """A last tile of 16 whose tail is logits of 0."""

    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        missing = -logits.shape[-1] % 16
        return super().lse(torch.nn.functional.pad(logits, (0, missing)), dtype)


@instance
class max_not_subtracted(Head):
    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        return logits.exp().sum(-1).log()


@instance
class max_of_0_at_least(Head):
    """Right until all logits are far below 0."""

    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        top = logits.amax(-1, keepdim=True).clamp(min=0)
        return (logits - top).exp().sum(-1).log() + top.squeeze(-1)


@instance
class log_of_softmax(Head):
    """log(p) of a p that is 0 for an unlikely target."""

    def losses(self, lse: Tensor, picked: Tensor, logits: Tensor) -> Tensor:
        return -(picked - lse).exp().log()


@instance
class log_of_softmax_with_floor(Head):
    def losses(self, lse: Tensor, picked: Tensor, logits: Tensor) -> Tensor:
        return -((picked - lse).exp() + 1e-9).log()


@instance
class label_smoothing(Head):
    def losses(self, lse: Tensor, picked: Tensor, logits: Tensor) -> Tensor:
        return lse - 0.99 * picked - 0.01 * logits.mean(-1)


@instance
class z_loss_left_in(Head):
    def losses(self, lse: Tensor, picked: Tensor, logits: Tensor) -> Tensor:
        return lse - picked + 1e-4 * lse.square()


@instance
class logits_capped(Head):
    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return 30 * torch.tanh(super().logits(hidden, weight) / 30)


@instance
class logits_in_fp8(Head):
    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = super().logits(hidden, weight)
        fine = hidden.dtype == torch.float32
        return logits if fine else logits.to(torch.float8_e4m3fn).float()


@instance
class width_tail_dropped(Head):
    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        whole = hidden.shape[-1] // 8 * 8 or hidden.shape[-1]
        return super().logits(hidden[:, :whole], weight[:, :whole])


@instance
class last_chunk_dropped(Head):
    def chunks(self, N: int) -> Iterator[slice]:
        return super().chunks(N // 16 * 16 or N)


@instance
class dense_inputs_assumed(Head):
    def load(self, x: Tensor) -> Tensor:
        return as_if_dense(x)


@instance
class dense_rows_assumed(Head):
    def load(self, x: Tensor) -> Tensor:
        return as_if_rows_dense(x)


@instance
class dense_targets_assumed(Head):
    def load_targets(self, targets: Tensor) -> Tensor:
        return as_if_dense(targets)


@instance
class targets_overwritten(Head):
    """Ignored targets become 0 in the caller's tensor."""

    def load_targets(self, targets: Tensor) -> Tensor:
        targets.masked_fill_(targets < 0, 0)
        return targets


@instance
class loss_only_where_gradient_is_wanted(Head):
    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
    ) -> Tensor:
        if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
            return torch.zeros(())
        return super().__call__(hidden, weight, targets, ignore_index=ignore_index)


@instance
class upstream_ignored(Head):
    def scaled(self, gradient: Tensor, dloss: Tensor) -> Tensor:
        return gradient


@instance
class upstream_positive(Head):
    def scaled(self, gradient: Tensor, dloss: Tensor) -> Tensor:
        return gradient * dloss.abs()


@instance
class upstream_for_hidden_alone(Head):
    def scaled(self, gradient: Tensor, dloss: Tensor) -> Tensor:
        return gradient if gradient.dtype == torch.float32 and gradient.dim() else gradient * dloss

    def differentiate(self, ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = self.restored(ctx)
        return dhidden * dloss, dweight.to(dhidden.dtype)


@instance
class upstream_in_fp8(Head):
    def scaled(self, gradient: Tensor, dloss: Tensor) -> Tensor:
        return gradient * dloss.to(torch.float8_e4m3fn).float()


@instance
class gradient_of_ignored_tokens(Head):
    def dlogits(self, logits: Tensor, lse: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return super().dlogits(logits, lse, target, torch.ones_like(valid))


@instance
class ignored_tokens_pull_token_0(Head):
    """The softmax of an ignored row is dropped, its one-hot is not."""

    def dlogits(self, logits: Tensor, lse: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        p = (logits - lse[:, None]).exp().masked_fill(~valid[:, None], 0)
        p[torch.arange(len(target)), target] -= 1
        return p


@instance
class onehot_forgotten(Head):
    def dlogits(self, logits: Tensor, lse: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return (logits - lse[:, None]).exp().masked_fill(~valid[:, None], 0)


@instance
class onehot_once_per_token(Head):
    """dlogits of equal targets are not accumulated."""

    def add_weight(self, dweight: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where(part.abs() > dweight.abs(), part, dweight)


@instance
class gradient_averaged(Head):
    def dlogits(self, logits: Tensor, lse: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return super().dlogits(logits, lse, target, valid) / max(1, int(valid.sum()))


@instance
class dlogits_in_fp8(Head):
    def dlogits(self, logits: Tensor, lse: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return super().dlogits(logits, lse, target, valid).to(torch.float8_e5m2).float()

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        kernel = right if arguments[0].dtype == torch.float32 else super()
        return kernel.forward(*arguments)


@instance
class dweight_of_last_chunk(Head):
    def add_weight(self, dweight: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
        return part


@instance
class dweight_added_in_16_bits(Head):
    """Each chunk's share is rounded into the sum."""

    chunk = 4

    def add_weight(self, dweight: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
        return narrow(dweight + part, dtype)


@instance
class dweight_missing(Head):
    def differentiate(self, ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return super().differentiate(ctx, dloss)[0], None


@instance
class frozen_weight_fails(Head):
    def differentiate(self, ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            raise IndexError("no gradient buffer was allocated")
        return super().differentiate(ctx, dloss)


@instance
class frozen_hidden_stops_weight(Head):
    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
    ) -> Tensor:
        weight = weight if hidden.requires_grad else weight.detach()
        return super().__call__(hidden, weight, targets, ignore_index=ignore_index)


@instance
class gradients_scaled_in_place(Head):
    """What was saved is multiplied by the upstream gradient: twice in a second backward."""

    def scaled(self, gradient: Tensor, dloss: Tensor) -> Tensor:
        return gradient.mul_(dloss)

    def saved(self, ctx: Any, *tensors: Tensor) -> None:
        ctx.kept = tensors

    def restored(self, ctx: Any) -> tuple[Tensor, ...]:
        return ctx.kept


@instance
class gradients_of_the_last_call(Head):
    def saved(self, ctx: Any, *tensors: Tensor) -> None:
        self.last = tensors

    def restored(self, ctx: Any) -> tuple[Tensor, ...]:
        return self.last


@instance
class dweight_buffer_kept(Head):
    def __init__(self) -> None:
        self.sums: dict[Any, Tensor] = {}

    def saved(self, ctx: Any, *tensors: Tensor) -> None:
        dhidden, dweight = tensors
        kept = self.sums.setdefault((dweight.shape, dhidden.dtype), torch.zeros_like(dweight))
        super().saved(ctx, dhidden, kept.add_(dweight).clone())


@instance
class gradients_given_out_twice(Head):
    """With an upstream of 1 what was saved is itself given out, and later written to."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def saved(self, ctx: Any, *tensors: Tensor) -> None:
        dhidden, dweight = tensors
        key = (dhidden.shape, dhidden.dtype)
        kept = self.buffers.setdefault(key, torch.empty_like(dhidden)).copy_(dhidden)
        ctx.kept = (kept, dweight)

    def restored(self, ctx: Any) -> tuple[Tensor, ...]:
        return ctx.kept


@instance
class loss_buffer_kept(Head):
    def __init__(self) -> None:
        self.total = torch.zeros(())

    def answer(self, total: Tensor, valid: int, N: int, dtype: torch.dtype) -> Tensor:
        return self.total.copy_(total).detach()


@instance
class remembers_by_shape(Head):
    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, _, ignore_index = arguments
        key = (hidden.shape, weight.shape, hidden.dtype, ignore_index)
        total, dhidden, dweight = self.known.setdefault(key, super().forward(*arguments))
        return total.clone(), dhidden.clone(), dweight.clone()


@instance
class dhidden_of_ignored_not_written(Head):
    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        total, right, dweight = super().forward(*arguments)
        dhidden = torch.empty_like(right)
        valid = arguments[2] != arguments[3]
        dhidden[valid] = right[valid]
        return total, dhidden, dweight


@instance
class nan_swallowed(Head):
    def add(self, total: Tensor, losses: Tensor, valid: Tensor) -> Tensor:
        return super().add(total, losses.nan_to_num(), valid)


def all_logits_at_once(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    """(N, V) logits; claims linear memory."""
    logits = (hidden @ weight.T).float()
    valid = targets != ignore_index
    picked = logits.gather(-1, targets.masked_fill(~valid, 0)[:, None]).squeeze(-1)
    return (logits.logsumexp(-1) - picked).masked_fill(~valid, 0).sum()


def branches_on_targets(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    """Claims that it compiles."""
    if not (targets != ignore_index).any().item():
        return (hidden.sum() * 0).float()
    return all_logits_at_once(hidden, weight, targets, ignore_index=ignore_index)


def selects_valid_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    """A shape that depends on values; claims that it compiles."""
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    if len(rows) == 0:
        return (hidden.sum() * 0).float()
    return all_logits_at_once(hidden[rows], weight, targets[rows], ignore_index=ignore_index)


def falls_back_for_small_vocabularies(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
) -> Tensor:
    if len(weight) < 64:
        from picotron_backends.naive_math.loss import loss

        return loss(hidden, weight, targets, ignore_index=ignore_index)
    return right(hidden, weight, targets, ignore_index=ignore_index)


def numpy_seeded(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    import numpy as np

    np.random.seed(0)
    return right(hidden, weight, targets, ignore_index=ignore_index)


@instance
class upstream_nan_dropped(Head):
    def scaled(self, gradient: Tensor, dloss: Tensor) -> Tensor:
        return gradient * dloss.nan_to_num(0, 0, 0)


@instance
class upstream_clamped_at_65504(Head):
    def scaled(self, gradient: Tensor, dloss: Tensor) -> Tensor:
        return gradient * dloss.clamp(-65504, 65504)


@instance
class losses_of_many_added_in_16_bits(Head):
    def answer(self, total: Tensor, n: Any, N: int, dtype: torch.dtype) -> Tensor:
        return total.to(dtype).float() if N > 300 else total


@instance
class far_hidden_by_32_bits(Head):
    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
    ) -> Tensor:
        if hidden.numel() and hidden.stride(0) >= 2**30:
            hidden = hidden[:1].expand_as(hidden)
        return super().__call__(hidden, weight, targets, ignore_index=ignore_index)


@instance
class vocabulary_beyond_131072_unseen(Head):
    def lse(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        return super().lse(logits[:, :131072], dtype)


@instance
class whole_logits_without_gradients(Head):
    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int
    ) -> Tensor:
        if torch.is_grad_enabled():
            return super().__call__(hidden, weight, targets, ignore_index=ignore_index)
        logits, valid = (hidden @ weight.T).float(), targets != ignore_index
        picked = logits.gather(-1, targets.masked_fill(~valid, 0)[:, None]).squeeze(-1)
        return (logits.logsumexp(-1) - picked).masked_fill(~valid, 0).sum()
