"""A training job: all that is decided and made before the first step."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from picotron_core.checkpoint.commit import listed
from picotron_core.checkpoint.load import find_checkpoint
from picotron_core.cli.console import View
from picotron_core.cli.first_state import first_state
from picotron_core.cli.model import draft_of, replicas_of
from picotron_core.cli.paths import recorded
from picotron_core.cli.plan import refuse_too_large
from picotron_core.cli.resume import refuse_finished, refuse_other_data, refuse_other_run, restore
from picotron_core.cli.runs import model_of, new_record, tokenizer_of, with_origin
from picotron_core.cli.selection import (
    find_device,
    open_quarantine,
    open_registry,
    select,
    training_requests,
)
from picotron_core.cli.stop import Stopped, uninterrupted
from picotron_core.cli.tokens import prepare_tokens
from picotron_core.config import Settings
from picotron_core.data.tokens import Tokens
from picotron_core.engine import run_directory, run_lock
from picotron_core.engine.metrics import matrix_product_rate
from picotron_core.engine.metrics_scan import rewind_metrics
from picotron_core.engine.model_record import ModelRecord, write_record
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.engine.state import TrainState
from picotron_core.engine.trace import Trace
from picotron_core.errors import ConfigError
from picotron_core.files import remove_tree
from picotron_core.hardware import Device, stand_in
from picotron_core.ops import Comm, Ops
from picotron_core.parallel.agreement import (
    agree,
    agree_on_plugins,
    common,
    devices_of_all,
    evidence_of_all,
)
from picotron_core.parallel.mesh import make_mesh
from picotron_core.parallel.parallelize import idle_settings
from picotron_core.parallel.timeline import Span, no_span
from picotron_core.parallel.watchdog import TRANSPORT_S
from picotron_core.parallel.world import World, forming_groups
from picotron_core.precision import Precision, choose_precision
from picotron_core.registry import Selection
from picotron_core.registry.bind import bind, tried_on
from picotron_core.registry.plugins import Registry
from picotron_core.registry.quarantine import Quarantine, Used
from picotron_core.registry.select import plugins_named
from picotron_core.schema import Config

KILLED_S = 2.0  # in which a process that was killed should be gone
REQUEUED_S = 120.0  # and a machine that lost power, for a file server
log = logging.getLogger("picotron")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that is ready to start."""

    config: Config
    world: World
    run: RunDirectory
    registry: Registry
    quarantine: Quarantine
    device: Device
    precision: Precision
    selections: tuple[Selection, ...]
    ops: Ops
    tokens: Tokens
    model: ModelRecord
    state: TrainState
    peak_flops: float
    flops_per_token: float
    trace: Trace | None = None
    verified: tuple[str, ...] = ()  # the checkpoint that the state came from
    is_new: bool = False  # its folder was made for it

    @property
    def span(self) -> Span:
        """What is told of the run's phases."""
        return self.trace.timeline.span if self.trace else no_span

    @property
    def global_batch(self) -> int:
        """Samples a step."""
        train = self.config.train
        return train.micro_batch * train.accumulation * self.state.layout.mesh.dp.size

    @property
    def used(self) -> list[Used]:
        """The kernels at work, with what they were tried on."""
        real = stand_in(self.device, self.world.local_rank)
        return [(s.chosen, tried_on(s.requests, real)) for s in self.selections]


def prepare_job(
    settings: Settings,
    resume: tuple[RunDirectory, Path] | None,
    world: World,
    view: View,
    held: ExitStack | None = None,
    *,
    watch: Callable[[Ops], Ops] = lambda ops: ops,
) -> Job:
    """Everything before the first step, cheapest checks first.

    Args:
        held: takes the run's lock, for as long as it is open; None for a run that nobody else can
            know of.
        watch: may wrap the ops, before the first collective.
    """
    config = settings.config
    enabled = sorted({*config.plugins.enable, *plugins_named(settings.rules)})
    agree_on_plugins(world, enabled)
    quarantine = open_quarantine(settings, evidence_of_all(world), world.local_rank)
    registry = open_registry(settings, quarantine)
    device = find_device(settings, registry, world.local_rank)
    precision = choose_precision(
        config.train.dtype,
        devices_of_all(world, device),
        reduce=config.train.reduce_dtype,
    )
    # A wish that cannot be met must not cost a tokenisation: the vocabulary decides no backend.
    draft = draft_of(config, resume and resume[0])
    replicas = replicas_of(config, draft, world.size)
    if world.is_first:
        for idle in idle_settings(config.parallel, replicas=replicas):
            log.warning("%s: it changes nothing here", idle)
    asked = training_requests(settings, draft, device, precision.compute, world.size)
    selected = select(settings, registry, asked)
    refuse_too_large(config, draft, device, precision, replicas, selected)

    resume = _of_the_first(resume, world) if resume else None
    is_new = resume is None and not config.run.resume
    made: list[RunDirectory] = []
    started: Comm | None = None
    try:
        run = resume[0] if resume else _new_run(config, world, made)
        run_directory.refuse_links(run)
        if held is not None:
            _lock(run, config, world, held)
        if resume is None and config.run.resume:  # after the lock: who had it may just have saved
            resume = _begun(run, world)
            if resume:
                refuse_finished(run, config, world)
        view.introduce(device, precision, world)
        found = find_checkpoint(resume[1], world) if resume else None
        facts = found.manifest.facts if found else None
        kept = None
        if found and facts:
            refuse_other_run(found, config, world)
            kept = model_of(run, facts, config)
            config = with_origin(config, facts)
        tokenizer = tokenizer_of(config, kept, facts)
        progress = view.progress if world.is_first else None
        tokens = prepare_tokens(config, tokenizer, progress, facts, ranks=world.size)
        if found and facts:
            refuse_other_data(found, tokens)
        model = kept or new_record(config, tokens.tokenizer)
        architecture = model.architecture
        asked = training_requests(settings, architecture, device, precision.compute, world.size)
        real = stand_in(device, world.local_rank)
        selected = common(world, select(settings, registry, asked))
        ops, selections = bind(selected, registry, quarantine=quarantine, real=real)
        ops = watch(ops)
        dtype = getattr(torch, precision.compute)
        place = torch.device(f"cuda:{world.local_rank}" if real.type == "cuda" else real.type)
        decided = {
            "dtype": precision.compute,
            "data": tokens.key,
            "step": str(found.manifest.step) if found else "0",
            "settings": f"{config.model} {config.train} {config.parallel} {config.data.seq_len} "
            f"{config.checkpoint.every} {config.run.trace} "
            f"{config.data.document_mask}",
        }
        agree(world, selections, decided)
        trace = None
        if steps := config.run.trace:
            trace = Trace(run.traces, world, steps=steps, device=place)
            ops = trace.watch_ops(ops)
        with forming_groups(world):
            ops.comm.start(
                store=world.store,
                rank=world.rank,
                world_size=world.size,
                device=place,
                timeout_s=config.run.timeout_s + TRANSPORT_S,  # the watchdog knows more to say
            )
            started = ops.comm
            mesh = make_mesh(
                ops.comm,
                rank=world.rank,
                world_size=world.size,
                pp=config.parallel.pp,
                cp=config.parallel.cp,
                tp=config.parallel.tp,
                watchdog=world.watchdog,
            )
        state = first_state(
            config, architecture, precision, ops, mesh, place, trace, resumed=bool(found)
        )
        if resume and found:
            found = restore(state, found, resume[1], selections, device, world)
        if world.is_first:
            skips = found.manifest.skips if found else 0
            rewind_metrics(run, state.step, skips=skips)
            if not (facts and facts.files):
                write_record(run, model)
            _write_down(run, config, selections, device)
        rate = matrix_product_rate(dtype, place)
        view.present(tokens, architecture, selections, run, rate)
    except BaseException as error:
        if started and world.size == 1:  # among others it may wait for them
            started.stop()
        if is_new and made:
            run_lock.remove_unused(made[0])
            if isinstance(error, Stopped):  # even if it has been described already
                remove_tree(made[0].path)
        raise
    return Job(
        config=config,
        world=world,
        run=run,
        registry=registry,
        quarantine=quarantine,
        device=device,
        precision=precision,
        selections=selections,
        ops=ops,
        tokens=tokens,
        model=model,
        state=state,
        peak_flops=rate * world.size,
        flops_per_token=architecture.flops_per_token(config.data.seq_len),
        trace=trace,
        verified=(found.folder.name,) if found else (),
        is_new=is_new,
    )


def discard_new(job: Job) -> None:
    """Remove the folder of a new run that was stopped before it measured or saved anything."""
    run = job.run
    measured = run.metrics.exists() and run.metrics.stat().st_size
    if job.is_new and job.world.is_first and not measured:
        remove_tree(run.path)


def _lock(run: RunDirectory, config: Config, world: World, held: ExitStack) -> None:
    """The first rank's lock keeps others out for all; where others are in, all ranks are told.

    A scheduler's start waits longer for the one before: nobody would start it again.
    """
    patience_s = min(REQUEUED_S, config.run.timeout_s / 2) if config.run.resume else KILLED_S
    refused = ""
    if world.is_first:
        try:
            held.enter_context(run_lock.alone_in(run, patience_s=patience_s))
        except ConfigError as error:
            refused = str(error)
    # `gather`, for no rank leaves it, and fails, before all have heard.
    if refused := world.gather("lock", refused)[0]:
        raise ConfigError(refused)


def _begun(run: RunDirectory, world: World) -> tuple[RunDirectory, Path] | None:
    """The run that `run.resume` means, if it has saved something; by the first rank's eyes, for a
    network disk may show others an older state.
    """
    saved = world.share("begun", lambda: str(bool(listed(run.checkpoints))))
    return (run, run.path) if saved == "True" else None


def _of_the_first(resume: tuple[RunDirectory, Path], world: World) -> tuple[RunDirectory, Path]:
    """The run that the first rank found: by the times of files, others may have found another. That
    their settings are of this one, `agree` makes sure.
    """
    found = world.share("resume", lambda: json.dumps([str(resume[0].path), str(resume[1])]))
    run, wanted = json.loads(found)
    return RunDirectory(Path(run)), Path(wanted)


def _new_run(config: Config, world: World, made: list[RunDirectory]) -> RunDirectory:
    """The folder of a new run; with `run.resume` that of its name, which may have begun.

    Args:
        made: gets it on the rank that makes it, as soon as it is there.
    """
    if config.run.resume and not config.run.name:
        raise ConfigError("run.resume goes on with the run of a name: give it by --run.name.")

    def make() -> str:
        parent = Path(config.run.dir).expanduser()
        with uninterrupted():
            made.append(run_directory.create(parent, config.run.name, again=config.run.resume))
        return str(made[0].path)

    return RunDirectory(Path(world.share("run", make)))


def _write_down(
    run: RunDirectory,
    config: Config,
    selections: tuple[Selection, ...],
    device: Device,
) -> None:
    asked = {s.op: list(s.asked) for s in selections if s.source != "auto"}
    resolved = recorded(config, run).model_copy(update={"backends": asked})
    run_directory.describe(run, resolved, selections, device)
    run_directory.make_durable(run)
