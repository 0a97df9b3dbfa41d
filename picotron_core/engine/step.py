"""One optimizer step: micro-batches, one global division, clip, update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from picotron_core.data.loader import Batch
from picotron_core.engine.state import TrainState
from picotron_core.errors import NotFiniteError, RunError
from picotron_core.ops import Ops
from picotron_core.ops.loss import IGNORE_INDEX
from picotron_core.ops.optimizer import AdamW
from picotron_core.parallel.context import own
from picotron_core.parallel.mesh import Axis
from picotron_core.parallel.placing import placed
from picotron_core.parallel.timeline import Span, no_span
from picotron_core.schema import Train


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    loss: float  # nats per valid token of the global batch
    grad_norm: float  # before clipping
    tokens: int  # valid tokens of the global batch
    skipped: bool = False  # a gradient overflowed: the weights are untouched


def train_step(
    state: TrainState,
    batches: Iterable[Batch],
    ops: Ops,
    *,
    lr: float,
    train: Train,
    span: Span = no_span,
) -> StepResult:
    """Advance `state` by one update over this rank's `batches`, together with all other ranks.

    The loss of each micro-batch is a sum; the gradient is divided once, by the number of valid
    tokens of the whole global batch, so accumulation and ranks change nothing but rounding.

    Under a loss scale an overflow is no error: the update is skipped, `state.step` stays, and the
    next call tries the same batch with half the scale.

    Args:
        span: told of the step's phases.

    Raises: NotFiniteError where loss or gradient is not finite; the weights are then untouched.
    """
    scale, weights = state.loss_scale, state.weights
    factor = scale.factor if scale else 1.0
    device = state.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, valid tokens, |gradient|^2
    sums[:2] = _forward_and_backward(state, batches, factor, span)
    with span("gradients"):
        gradients = weights.gradients()
    sums[2] = _square(state, gradients)
    # over all ranks: all_reduce(sum). All decide by the same numbers: a rank that skipped a step
    # alone would leave the others waiting.
    state.layout.mesh.world.all_reduce(sums)

    loss_sum, tokens, square = sums
    norm = square.sqrt() / (tokens * factor)
    # The update's one wait for the device: a gradient that is not finite must not reach the
    # weights. On a GPU whose queue is long enough, a rank waits here for one that is lost.
    with state.layout.mesh.world.watchdog.waiting("all_reduce over world"):
        mean, grad_norm, count = torch.stack([loss_sum / tokens, norm, tokens]).tolist()
    bad = not (math.isfinite(mean) and math.isfinite(grad_norm))
    if not count:
        raise RunError(f"No target of step {state.step + 1} is valid: all are ignored.")
    if bad and scale:
        state.loss_scale = scale.after_overflow()
        weights.drop_gradients()
        return StepResult(loss=mean, grad_norm=grad_norm, tokens=int(count), skipped=True)
    if bad:
        raise NotFiniteError(
            f"The loss is {mean:g} and the gradient norm {grad_norm:g} at step {state.step + 1}. "
            f"The update was not made. Lower train.lr (now {train.lr:g}) or raise "
            f"train.warmup_steps (now {train.warmup_steps})."
        )
    clip = min(1.0, train.clip / grad_norm) if train.clip and grad_norm else 1.0
    torch._foreach_mul_(list(gradients.values()), clip / (count * factor))
    with span("optimizer"):
        _update(state, gradients, ops, lr=lr, train=train)
    if scale:
        state.loss_scale = scale.after_update()
    state.step += 1
    state.tokens += int(count)
    return StepResult(loss=mean, grad_norm=grad_norm, tokens=int(count))


@torch.no_grad()
def evaluate(state: TrainState, batches: Iterable[Batch]) -> float:
    """The mean loss in nats per token over the batches of all ranks."""
    device = state.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if pipeline := state.layout.pipeline:
        every = list(batches)
        sums += _loss_and_tokens(state, pipeline.evaluate(every), every)
    else:
        for batch in batches:
            sums += _loss_and_tokens(state, [batch_loss(state, batch)], [batch])
    state.layout.mesh.world.all_reduce(sums)  # over all ranks: all_reduce(sum)
    with state.layout.mesh.world.watchdog.waiting("all_reduce over world"):
        return float(sums[0] / sums[1])


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to norms, nor to embeddings (nor a head tied to one)."""
    return parameter.ndim >= 2 and "embed_tokens" not in name


def part_of(batch: Batch, cp: Axis) -> Batch:
    """This rank's tokens of a batch. The documents stay whole: a rank's queries see all keys."""
    inputs, targets = (own(t, cp.index, cp.size, dim=1) for t in (batch.inputs, batch.targets))
    return replace(batch, inputs=inputs, targets=targets)


def batch_loss(state: TrainState, batch: Batch) -> Tensor:
    """The sum of the losses of one micro-batch."""
    device = state.device
    doc_ids = None if batch.doc_ids is None else placed(batch.doc_ids, device)
    inputs = placed(batch.inputs, device)
    targets = placed(batch.targets, device)
    return state.model.loss(inputs, targets, doc_ids=doc_ids)


def _forward_and_backward(
    state: TrainState, batches: Iterable[Batch], factor: float, span: Span
) -> Tensor:
    """Leave the gradients with the weights; returns `_loss_and_tokens` of all batches."""
    weights = state.weights
    if pipeline := state.layout.pipeline:
        every = list(batches)
        losses = pipeline.train(every, factor=factor, expect=lambda last: weights.expect(last=last))
        return _loss_and_tokens(state, losses, every)
    sums = torch.zeros(2, dtype=torch.float64, device=state.device)
    for number, (batch, last) in enumerate(_with_last(batches)):
        weights.expect(last=last)
        with span("forward", micro_batch=number):
            loss = batch_loss(state, batch)
        with span("backward", micro_batch=number):
            (loss * factor).backward()  # type: ignore[no-untyped-call]
        sums += _loss_and_tokens(state, [loss], [batch])
    return sums


def _loss_and_tokens(
    state: TrainState, losses: Sequence[Tensor], batches: Sequence[Batch]
) -> Tensor:
    """What this rank adds to the sums over all ranks: several may have the same batch."""
    sums = torch.zeros(2, dtype=torch.float64, device=state.device)
    if state.layout.has_loss:
        for loss, batch in zip(losses, batches, strict=True):
            sums[0] += loss.detach().double()
            sums[1] += int((batch.targets != IGNORE_INDEX).sum())  # counted on the host
    return sums


def _square(state: TrainState, gradients: dict[str, Tensor]) -> Tensor:
    """What this rank adds to the squared norm of the whole gradient."""
    mine = [g for name, g in gradients.items() if state.layout.counts(name)]
    if not (mine and state.weights.counts):
        return torch.zeros((), dtype=torch.float64, device=state.device)
    return torch.stack(torch._foreach_norm(mine)).double().square().sum()


def _with_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last."""
    remaining = iter(batches)
    batch = next(remaining)
    for following in remaining:
        yield batch, False
        batch = following
    yield batch, True


def _update(
    state: TrainState, gradients: dict[str, Tensor], ops: Ops, *, lr: float, train: Train
) -> None:
    parameters = dict(state.model.named_parameters())
    for decay in (True, False):
        names = [name for name in state.masters if decays(name, parameters[name]) is decay]
        if not names:  # the part of a rank may be all of one kind
            continue
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
    gradients.clear()  # or they would be there beside the copies that `publish` sends
    state.weights.drop_gradients()
    state.weights.publish()
