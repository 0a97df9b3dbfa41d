"""One optimizer step: micro-batches, one global division, clip, update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from picotron_core.data.loader import Batch
from picotron_core.engine.state import TrainState
from picotron_core.errors import NotFiniteError, RunError
from picotron_core.ops import Comm, Ops
from picotron_core.ops.loss import IGNORE_INDEX
from picotron_core.ops.optimizer import AdamW
from picotron_core.parallel.data import sum_over_ranks
from picotron_core.schema import Train


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    loss: float  # nats per valid token of the global batch
    grad_norm: float  # before clipping
    tokens: int  # valid tokens of the global batch
    skipped: bool = False  # a gradient overflowed: the weights are untouched


def train_step(
    state: TrainState, batches: Iterable[Batch], ops: Ops, *, lr: float, train: Train
) -> StepResult:
    """Advance `state` by one update over this rank's `batches`, together with all other ranks.

    The loss of each micro-batch is a sum; the gradient is divided once, by the number of valid
    tokens of the whole global batch, so accumulation and ranks change nothing but rounding.

    Under a loss scale an overflow is no error: the update is skipped, `state.step` stays, and the
    next call tries the same batch with half the scale.

    Raises: NotFiniteError where loss or gradient is not finite; the weights are then untouched.
    """
    scale = state.loss_scale
    factor = scale.factor if scale else 1.0
    device = state.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss sum, valid tokens
    for batch in batches:
        loss = batch_loss(state, batch)
        (loss * factor).backward()  # type: ignore[no-untyped-call]
        totals += torch.stack([loss.detach().double(), _valid_tokens(batch, device)])
    gradients = {name: _gradient(name, master) for name, master in state.masters.items()}
    sum_over_ranks([totals, *gradients.values()], ops.comm, dtype=reduce_dtype(train))

    loss_sum, tokens = totals
    norm = torch.nn.utils.get_total_norm(gradients.values()) / (tokens * factor)
    overflow = (~torch.isfinite(loss_sum + norm)).double()
    if scale:
        # over dp: all_reduce(sum). A rank that skips alone would leave the others waiting.
        sum_over_ranks([overflow], ops.comm)
    # The step's one wait for the device: a gradient that is not finite must not reach the weights.
    mean, grad_norm, count, bad = torch.stack([loss_sum / tokens, norm, tokens, overflow]).tolist()
    if not count:
        raise RunError(f"No target of step {state.step + 1} is valid: all are ignored.")
    if bad and scale:
        state.loss_scale = scale.after_overflow()
        state.drop_gradients()
        return StepResult(loss=mean, grad_norm=grad_norm, tokens=int(count), skipped=True)
    if bad:
        raise NotFiniteError(
            f"The loss is {mean:g} and the gradient norm {grad_norm:g} at step {state.step + 1}. "
            f"The update was not made. Lower train.lr (now {train.lr:g}) or raise "
            f"train.warmup_steps (now {train.warmup_steps})."
        )
    clip = min(1.0, train.clip / grad_norm) if train.clip and grad_norm else 1.0
    torch._foreach_mul_(list(gradients.values()), clip / (count * factor))
    _update(state, gradients, ops, lr=lr, train=train)
    if scale:
        state.loss_scale = scale.after_update()
    state.step += 1
    state.tokens += int(count)
    return StepResult(loss=mean, grad_norm=grad_norm, tokens=int(count))


@torch.no_grad()
def evaluate(state: TrainState, batches: Iterable[Batch], comm: Comm) -> float:
    """The mean loss in nats per token over the batches of all ranks."""
    device = state.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        loss = batch_loss(state, batch)
        totals += torch.stack([loss.double(), _valid_tokens(batch, device)])
    sum_over_ranks([totals], comm)
    return float(totals[0] / totals[1])


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to norms, nor to embeddings (nor a head tied to one)."""
    return parameter.ndim >= 2 and "embed_tokens" not in name


def reduce_dtype(train: Train) -> torch.dtype | None:
    """What gradients travel between ranks in; None is their own float32."""
    if train.reduce_dtype in ("auto", "float32"):
        return None
    dtype: torch.dtype = getattr(torch, train.reduce_dtype)
    return dtype


def batch_loss(state: TrainState, batch: Batch) -> Tensor:
    """The sum of the losses of one micro-batch."""
    device = state.device
    doc_ids = None if batch.doc_ids is None else batch.doc_ids.to(device)
    inputs = batch.inputs.to(device)
    targets = batch.targets.to(device)
    return state.model.loss(inputs, targets, doc_ids=doc_ids)


def _valid_tokens(batch: Batch, device: torch.device) -> Tensor:
    return (batch.targets != IGNORE_INDEX).sum().double().to(device)


def _gradient(name: str, master: Tensor) -> Tensor:
    if master.grad is None:
        raise RunError(
            f"{name} got no gradient: a backend's backward lost it. Train with "
            "--backends naive-math, and prove the backends in use with the conformance suite."
        )
    return master.grad


def _update(
    state: TrainState, gradients: dict[str, Tensor], ops: Ops, *, lr: float, train: Train
) -> None:
    for decay in (True, False):
        names = [name for name, master in state.masters.items() if decays(name, master) is decay]
        hyper = AdamW(
            lr=lr,
            beta1=train.beta1,
            beta2=train.beta2,
            eps=train.eps,
            weight_decay=train.weight_decay if decay else 0.0,
        )
        with torch.no_grad():
            ops.optimizer(
                [state.masters[name] for name in names],
                [gradients[name] for name in names],
                {state_: [m[name] for name in names] for state_, m in state.moments.items()},
                step=state.step + 1,
                hyper=hyper,
            )
    state.publish()
    state.drop_gradients()
