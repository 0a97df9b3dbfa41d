"""Some real steps of a run's settings on one rank, and what they took."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from picotron_core.cli.first_state import first_state
from picotron_core.cli.job import Job
from picotron_core.cli.plan import work_of
from picotron_core.data.tokens import Tokens
from picotron_core.engine.kernel_memory import Work
from picotron_core.engine.metrics import StepRecord
from picotron_core.engine.peak import hold_no_freed_memory, peak, reset_peak
from picotron_core.engine.train import train
from picotron_core.hardware import stand_in
from picotron_core.model.architecture import Architecture
from picotron_core.ops import Ops, Optimizer
from picotron_core.ops.optimizer import AdamW
from picotron_core.parallel.mesh import Mesh
from picotron_core.parallel.traffic import NotedComm
from picotron_core.parallel.world import World
from picotron_core.precision import Precision
from picotron_core.schema import Config


@dataclass(slots=True)
class NotedOptimizer:
    """Keeps the contract of `optimizer` by another's keeping it; notes the bytes of what came."""

    optimizer: Optimizer
    masters: int = 0
    gradients: int = 0
    moments: int = 0

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        *,
        step: int,
        hyper: AdamW,
    ) -> None:
        self.masters += _bytes(params)
        self.gradients += _bytes(grads)
        self.moments += sum(map(_bytes, states.values()))
        self.optimizer(params, grads, states, step=step, hyper=hyper)

    def clear(self) -> None:
        self.masters = self.gradients = self.moments = 0


@dataclass(slots=True)
class Noted:
    """What the ops of this rank are given; `watch` puts it between them and the run."""

    comm: NotedComm = field(init=False)
    optimizer: NotedOptimizer = field(init=False)

    def watch(self, ops: Ops) -> Ops:
        self.comm, self.optimizer = NotedComm(ops.comm), NotedOptimizer(ops.optimizer)
        return replace(ops, comm=self.comm, optimizer=self.optimizer)

    def clear(self) -> None:
        self.comm.calls.clear()
        self.optimizer.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All that a rank's trials share. It holds no model: each trial makes its own.

    work: of a step by the settings as they are, for counting.
    """

    noted: Noted
    work: Work
    config: Config
    world: World
    architecture: Architecture
    precision: Precision
    ops: Ops
    tokens: Tokens
    mesh: Mesh
    device: torch.device

    @classmethod
    def of(cls, job: Job, noted: Noted) -> Bench:
        mesh, selections = job.state.layout.mesh, {s.op: s for s in job.selections}
        work = work_of(
            job.config,
            job.state.model.architecture,
            stand_in(job.device, job.world.local_rank),
            job.precision,
            mesh.dp.size,
            selections,
        )
        return cls(
            noted=noted,
            work=work,
            config=job.config,
            world=job.world,
            architecture=job.state.model.architecture,
            precision=job.precision,
            ops=job.ops,
            tokens=job.tokens,
            mesh=mesh,
            device=job.state.device,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one rank saw; all sizes are bytes, and what is sent and updated is the last step's.

    weights: of the model, in the compute dtype; masters, gradients, moments: given to the
        optimizer. In float32 the masters are the weights, or a part of them.
    sent: collective and dtype -> what the best algorithm must send, see `bytes_sent`; over the
        ranks with the same weights alone. collectives: how many there were.
    start, most: the peaks of making the state, and of the steps, above what the process held
        before; None where the system does not tell.
    """

    losses: list[float | None]
    step_s: list[float]
    parameters: int
    weights: int
    masters: int
    gradients: int
    moments: int
    sent: dict[str, int]
    collectives: dict[str, int]
    start: int | None
    most: int | None


def try_out(
    bench: Bench, config: Config, *, reduce: str, steps: int, exactly: bool = False
) -> Trial:
    """Train a new model for some steps, of which the first does not count for time.

    Args:
        config: as the bench's, but for what decides nothing before the model is made.
        exactly: hold memory as the tensors do, for a peak that can be reckoned; times are worse.
    """
    noted, mesh, device = bench.noted, bench.mesh, bench.device
    hold_no_freed_memory(exactly)
    gc.collect()
    # The end is not reached: neither an evaluation nor a last learning rate comes into it.
    length = max(config.train.steps, steps + 1)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"steps": length, "eval_every": 0})}
    )
    before = reset_peak(device)
    precision = replace(bench.precision, reduce=reduce)
    state = first_state(config, bench.architecture, precision, bench.ops, mesh, device)
    start = None if before is None else peak(device) - before
    reset_peak(device)
    records = train(
        state,
        config=config,
        tokens=bench.tokens,
        ops=bench.ops,
        world=bench.world,
        flops_per_token=0,
        peak_flops=None,
    )
    losses, step_s = [], []
    for record, *_ in islice(records, steps):
        assert isinstance(record, StepRecord)
        losses.append(record.loss)
        step_s.append(record.step_s)
        if len(losses) < steps:
            noted.clear()
    state.weights.wait()
    parameters = list(state.model.parameters())
    calls = [call for call in noted.comm.calls if call.ranks == mesh.data.ranks]
    kinds = [f"{call.op} {call.dtype}" for call in calls]
    trial = Trial(
        losses=losses,
        step_s=step_s[1:],
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=_bytes(parameters),
        masters=noted.optimizer.masters,
        gradients=noted.optimizer.gradients,
        moments=noted.optimizer.moments,
        sent={
            kind: sum(c.moved for c, of in zip(calls, kinds, strict=True) if of == kind)
            for kind in kinds
        },
        collectives={kind: kinds.count(kind) for kind in kinds},
        start=start,
        most=None if before is None else peak(device) - before,
    )
    noted.clear()
    return trial


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
