"""The training loop. It yields a record per step; its caller prints and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from picotron_core.data.loader import Batch, batch, num_windows, validation_batches
from picotron_core.data.sampler import Sampler
from picotron_core.data.tokens import Tokens
from picotron_core.engine.loss_scale import LossScale
from picotron_core.engine.metrics import EvalRecord, Record, StepRecord, bits_per_byte
from picotron_core.engine.metrics import peak_memory_bytes as peak_memory
from picotron_core.engine.overflow import first_overflow, where_it_began
from picotron_core.engine.schedule import learning_rate
from picotron_core.engine.state import TrainState
from picotron_core.engine.step import evaluate, part_of, train_step
from picotron_core.errors import NotFiniteError
from picotron_core.ops import Ops
from picotron_core.parallel.timeline import Span, no_span
from picotron_core.parallel.world import World
from picotron_core.schema import Config


def train(
    state: TrainState,
    *,
    config: Config,
    tokens: Tokens,
    ops: Ops,
    world: World,
    flops_per_token: float,
    peak_flops: float | None,
    span: Span = no_span,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Record, ...]]:
    """Advance `state` to `config.train.steps`, yielding the records of each step: the step's own,
    and an evaluation's where one is due.

    When it yields, `state` is whole: the caller may save it, or stop asking.

    Args:
        flops_per_token: the model's FLOPs for one trained token.
        peak_flops: FLOP/s of all ranks' devices together, for `mfu`; None leaves it out.
        span: told of each step, its phases, and each evaluation.
        stopped: whether to leave an evaluation before its end. It then has no record.

    Raises: NotFiniteError where the loss or the gradient is not finite, in float16 after
        `train.max_skips` overflows in a row.
    """
    settings, seq_len = config.train, config.data.seq_len
    sampler = Sampler(num_windows(tokens.train, seq_len), settings.seed)
    while state.step < settings.steps:
        start = time.perf_counter()
        lr = learning_rate(state.step + 1, settings)
        batches = _batches(state, config, tokens, sampler)
        world.watchdog.enter(f"step {state.step + 1}")
        with span("step", step=state.step + 1):
            result = train_step(state, batches, ops, lr=lr, train=settings, span=span)
        scale = state.loss_scale
        if scale and scale.skips >= settings.max_skips:
            batches = _batches(state, config, tokens, sampler)
            raise NotFiniteError(_overflowing(state, scale, batches, world))
        step_s = time.perf_counter() - start
        tokens_per_s = result.tokens / step_s
        record = StepRecord(
            step=state.step,
            tokens=state.tokens,
            loss=result.loss if math.isfinite(result.loss) else None,
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            lr=lr,
            tokens_per_s=tokens_per_s,
            mfu=tokens_per_s * flops_per_token / peak_flops if peak_flops else None,
            step_s=step_s,
            peak_memory_bytes=peak_memory(state.device),
            loss_scale=scale.value if scale else None,
            skipped=result.skipped,
        )
        if result.skipped:
            yield (record,)
            continue
        last = state.step == settings.steps
        if last or (settings.eval_every and state.step % settings.eval_every == 0):
            world.watchdog.enter(f"the evaluation after step {state.step}")
            with span("evaluation"):
                evaluation = _evaluation(state, config, tokens, stopped)
            yield (record, evaluation) if evaluation else (record,)
        else:
            yield (record,)


def _overflowing(
    state: TrainState, scale: LossScale, batches: Iterator[Batch], world: World
) -> str:
    """Why the run stops. All ranks call it, for the overflow may be of one rank's batch alone."""
    # The scale is halved already: what overflowed did so with twice of it.
    mine = first_overflow(state, batches, factor=2 * scale.factor)
    place = where_it_began(world.gather("overflow", mine))
    return (
        f"Step {state.step + 1} overflowed {scale.skips} times in a row, down to a loss scale of "
        f"{scale.value:g}.{place} The update was not made. Use --train.dtype float32, or lower "
        "--train.lr."
    )


def _batches(
    state: TrainState, config: Config, tokens: Tokens, sampler: Sampler
) -> Iterator[Batch]:
    """This rank's micro-batches of the next step: a pure function of its number."""
    settings, dp, cp = config.train, state.layout.mesh.dp, state.layout.mesh.cp
    for micro_batch_index in range(settings.accumulation):
        whole = batch(
            tokens.train,
            sampler,
            seq_len=config.data.seq_len,
            step=state.step,
            global_batch=settings.micro_batch * settings.accumulation * dp.size,
            rank=dp.index,
            world_size=dp.size,
            micro_batch=settings.micro_batch,
            micro_batch_index=micro_batch_index,
            eos_id=tokens.eos_id if config.data.document_mask else None,
        )
        yield part_of(whole, cp)


def _evaluation(
    state: TrainState, config: Config, tokens: Tokens, stopped: Callable[[], bool]
) -> EvalRecord | None:
    """None where it was left before its end."""
    dp, cp = state.layout.mesh.dp, state.layout.mesh.cp
    batches = validation_batches(
        tokens.validation,
        seq_len=config.data.seq_len,
        samples=config.train.eval_samples,
        micro_batch=config.train.micro_batch,
        rank=dp.index,
        world_size=dp.size,
        eos_id=tokens.eos_id if config.data.document_mask else None,
    )
    left: list[bool] = []

    def until_stopped() -> Iterator[Batch]:
        for whole in batches:
            if stopped():
                left.append(True)
                return
            yield part_of(whole, cp)

    loss = evaluate(state, until_stopped())
    if left:
        return None
    return EvalRecord(
        step=state.step,
        tokens=state.tokens,
        val_loss=loss,
        bits_per_byte=bits_per_byte(loss, tokens.bytes_per_token),
    )
