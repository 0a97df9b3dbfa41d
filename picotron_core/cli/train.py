"""`picotron train`: from settings to a trained model, one frozen value after the other."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from picotron_core.checkpoint.load import find_checkpoint, load
from picotron_core.checkpoint.save import save
from picotron_core.cli import INTERRUPTED
from picotron_core.cli.console import View, open_view
from picotron_core.cli.generate import write_text
from picotron_core.cli.model import architecture_of
from picotron_core.cli.selection import find_device, open_registry, select, training_requests
from picotron_core.config import Config, Settings
from picotron_core.data.corpus import open_corpus
from picotron_core.data.loader import num_windows
from picotron_core.data.token_cache import prepare
from picotron_core.data.tokens import Tokens
from picotron_core.engine import run_directory
from picotron_core.engine.metrics import StepRecord, matrix_product_rate
from picotron_core.engine.plot import plot_losses
from picotron_core.engine.run_directory import RunDirectory, selection_record
from picotron_core.engine.state import TrainState, new_state
from picotron_core.engine.train import train
from picotron_core.errors import ConfigError
from picotron_core.hardware import Device
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import initialise
from picotron_core.model.llama import Llama
from picotron_core.model.pretrained import load_weights
from picotron_core.ops import Ops
from picotron_core.parallel.agreement import agree
from picotron_core.parallel.data import sum_over_ranks
from picotron_core.parallel.world import World, join
from picotron_core.precision import choose_precision
from picotron_core.registry import Selection
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import Registry, notify

log = logging.getLogger("picotron")


def find_run(wish: str, runs: str) -> RunDirectory:
    """The run to continue: a folder, one of its checkpoints, or with auto the newest in `runs`."""
    if wish == "auto":
        configs = Path(runs).glob("*/config.toml")
        newest = max(configs, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise ConfigError(f"--resume auto: no run in {runs}/. Start one with picotron train.")
        return RunDirectory(newest.parent)
    path = Path(wish)
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    if not (path / "config.toml").is_file():
        raise ConfigError(f"--resume {wish}: no run there (no config.toml). See the folder runs/.")
    return RunDirectory(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that is ready to start."""

    config: Config
    world: World
    run: RunDirectory
    registry: Registry
    device: Device
    selections: tuple[Selection, ...]
    ops: Ops
    tokens: Tokens
    state: TrainState
    peak_flops: float
    flops_per_token: float


def run_training(settings: Settings, *, resume_from: RunDirectory | None = None) -> int:
    """Train as the settings say; returns the exit code."""
    world = join(timeout_s=settings.config.run.timeout_s)
    with open_view(settings.config, world) as view:
        job = _prepare(settings, resume_from, world, view)
        try:
            stopped = _loop(job, view)
        finally:
            job.ops.comm.stop()
    if not world.is_first:
        return INTERRUPTED if stopped else 0
    if stopped:
        print(f"Stopped at step {job.state.step}, saved. Go on with:\n")
        print(f"  picotron train --resume {job.run.path}")
        return INTERRUPTED
    _farewell(settings, job)
    return 0


def _prepare(settings: Settings, resume_from: RunDirectory | None, world: World, view: View) -> Job:
    """Everything before the first step, cheapest checks first."""
    config = settings.config
    registry = open_registry(settings)
    for plugin in registry.failed():
        log.warning("plugin %s failed to load: %s", plugin.provider.plugin, plugin.error)
    device = find_device(settings, registry)
    precision = choose_precision(config.train.dtype, device)
    # A wish that cannot be met must not cost a tokenisation: the vocabulary decides no backend.
    draft = architecture_of(config, config.data.vocab_size if not config.model.path else 1)
    select(
        settings,
        registry,
        training_requests(settings, draft, device, precision.compute, world.size),
    )

    run = resume_from or _new_run(config, world)
    try:
        view.introduce(device, precision, world)
        tokens = _tokens(config, world, view)
        architecture = architecture_of(config, tokens.vocab_size)
        wanted = training_requests(settings, architecture, device, precision.compute, world.size)
        ops, selections = bind(select(settings, registry, wanted), registry)
        agree(world, selections, precision.compute)
        place = torch.device(f"cuda:{world.local_rank}" if device.type == "cuda" else device.type)
        ops.comm.start(
            store=world.store,
            rank=world.rank,
            world_size=world.size,
            device=place,
            timeout_s=config.run.timeout_s,
        )
        state = new_state(
            _model(config, architecture, ops), dtype=getattr(torch, precision.compute), device=place
        )
        if resume_from is not None:
            _resume(state, run, tokens)
        if world.is_first:
            _write_down(run, config, tokens, selections, device)
        rate = matrix_product_rate(getattr(torch, precision.compute), place)
        view.present(tokens, architecture, selections, run, rate)
    except BaseException:
        if resume_from is None and world.is_first:
            with suppress(OSError):  # not empty: something worth keeping was written
                run.path.rmdir()
        raise
    return Job(
        config=config,
        world=world,
        run=run,
        registry=registry,
        device=device,
        selections=selections,
        ops=ops,
        tokens=tokens,
        state=state,
        peak_flops=rate * world.size,
        flops_per_token=architecture.flops_per_token(config.data.seq_len),
    )


def _new_run(config: Config, world: World) -> RunDirectory:
    path = world.share(
        "run", lambda: str(run_directory.create(Path(config.run.dir), config.run.name).path)
    )
    return RunDirectory(Path(path))


def _tokens(config: Config, world: World, view: View) -> Tokens:
    data = config.data
    tokens = prepare(
        open_corpus(data.paths, text_field=data.text_field, split=data.split),
        tokenizer=data.tokenizer or config.model.path,
        vocab_size=data.vocab_size,
        val_fraction=data.val_fraction,
        cache_dir=Path(data.cache_dir).expanduser(),
        progress=view.progress if world.is_first else None,
    )
    for ids in (tokens.train, tokens.validation):  # now, not at the first evaluation
        num_windows(ids, data.seq_len)
    return tokens


def _model(config: Config, architecture: Architecture, ops: Ops) -> Llama:
    model = Llama(architecture, ops)
    initialise(model, config.train.seed)
    if config.model.path and config.model.pretrained:
        load_weights(model, config.model.path)
    return model


def _resume(state: TrainState, run: RunDirectory, tokens: Tokens) -> None:
    folder, manifest = find_checkpoint(run.path)
    if manifest["data"] != tokens.key:
        raise ConfigError(
            f"{run.path} was trained on other data or another tokenizer than the settings give "
            f"now. Restore them, or start a new run from its weights."
        )
    load(state, folder, manifest)
    run_directory.rewind_metrics(run, state.step)
    log.info("resumed from %s", folder)


def _write_down(
    run: RunDirectory,
    config: Config,
    tokens: Tokens,
    selections: tuple[Selection, ...],
    device: Device,
) -> None:
    asked = {selection.op: list(selection.asked) for selection in selections}
    named = config.run.model_copy(update={"name": run.path.name, "dir": str(run.path.parent)})
    resolved = config.model_copy(update={"backends": asked, "run": named})
    run_directory.describe(run, resolved, selections, device)
    tokens.tokenizer.save(run.tokenizer)


def _loop(job: Job, view: View) -> bool:
    """Train to the end, or until someone asks to stop. Returns whether it was stopped."""
    records = train(
        job.state,
        config=job.config,
        tokens=job.tokens,
        ops=job.ops,
        world=job.world,
        flops_per_token=job.flops_per_token,
        peak_flops=job.peak_flops,
    )
    saved = job.state.step
    with _interrupt() as asked_to_stop:
        for record in records:
            if job.world.is_first:
                run_directory.append_metrics(job.run, record)
                notify(job.registry, "picotron_on_step", record=run_directory.as_line(record))
                view.show(record)
            every = job.config.checkpoint.every
            due = bool(every) and job.state.step % every == 0
            if isinstance(record, StepRecord) and due:
                _save(job)
                saved = job.state.step
            if _any_rank(asked_to_stop, job):
                break
        else:
            asked_to_stop.clear()
    if saved != job.state.step:
        _save(job)
    return bool(asked_to_stop)


def _save(job: Job) -> None:
    if not job.world.is_first:
        return
    facts: dict[str, Any] = {
        "data": job.tokens.key,
        "eos_id": job.tokens.eos_id,
        "seed": job.config.train.seed,
        "backends": [selection_record(selection) for selection in job.selections],
    }
    save(job.state, job.run.checkpoints, facts=facts, keep=job.config.checkpoint.keep)
    _plot(job)


def _plot(job: Job) -> bool:
    lines = list(run_directory.read_metrics(job.run))
    return plot_losses(lines, job.run.plot, title=job.run.path.name)


@contextmanager
def _interrupt() -> Iterator[list[int]]:
    """A list that holds the signal once Ctrl-C was pressed; pressed twice, it quits at once."""
    caught: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        print("\nStopping after this step; Ctrl-C again quits without saving.", flush=True)

    former = signal.signal(signal.SIGINT, on_signal)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, former)


def _any_rank(asked: list[int], job: Job) -> bool:
    """Whether any rank was asked to stop: all must leave the loop at the same step."""
    if job.world.size == 1:
        return bool(asked)
    flag = torch.tensor([float(bool(asked))], device=next(iter(job.state.masters.values())).device)
    sum_over_ranks([flag], job.ops.comm)
    if flag.item():
        asked.append(signal.SIGINT)
    return bool(asked)


def _farewell(settings: Settings, job: Job) -> None:
    """What the run wrote, and what to do with it."""
    run = job.run
    checkpoint, manifest = find_checkpoint(run.path)
    if settings.config.run.sample:
        print(f"\nA sample, continuing {settings.config.run.sample!r}:\n")
        write_text(
            settings,
            run,
            checkpoint,
            manifest,
            prompt=settings.config.run.sample,
        )
    if run.plot.exists():
        print(f"\nThe losses as a picture: {run.plot}")
    else:
        print("\nFor a picture of the losses: pip install 'picotron[plot]'")
    print("\nNext:")
    for command in (
        f"picotron generate {run.path} --prompt 'def main('",
        f"picotron train --resume {run.path} --train.steps {settings.config.train.steps * 2}",
        "picotron train --data YOUR_TEXT_FILES",
        "PICOTRON_BACKENDS=naive-math picotron train",
        "picotron backends",
    ):
        print(f"  {command}")
