"""Going on with a run: which one, from which checkpoint, and whether these settings can."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from pydantic import ValidationError

from picotron_core.checkpoint.commit import listed, step_of
from picotron_core.checkpoint.load import Checkpoint, find_checkpoint, load_newest
from picotron_core.checkpoint.manifest import Backend, Facts, Manifest
from picotron_core.checkpoint.pieces import degrees_of
from picotron_core.cli.runs import find_run_folder
from picotron_core.data.tokens import Tokens
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.engine.schedule import changed_plan
from picotron_core.engine.state import TrainState
from picotron_core.errors import ConfigError
from picotron_core.hardware import Device
from picotron_core.parallel.mesh import data_parallel_degree
from picotron_core.parallel.world import World
from picotron_core.registry import Selection
from picotron_core.schema import Config, Train

log = logging.getLogger("picotron")


def find_run(wish: str, runs: str) -> tuple[RunDirectory, Path]:
    """The run to continue, and the folder to look for its checkpoint in.

    Args:
        wish: a run's folder, one of its checkpoints, or auto for the newest run in `runs`.
    """
    if wish == "auto":
        configs = Path(runs).expanduser().glob("*/config.toml")
        saved = [path for path in configs if listed(path.parent / "checkpoints")]
        newest = max(saved, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise ConfigError(f"--resume auto: no run in {runs}/ has a checkpoint to go on from.")
        return RunDirectory(newest.parent), newest.parent
    return find_run_folder(wish)


class Finished(Exception):  # noqa: N818 - it is no error
    """A run that was to go on if there is something to do, and there is nothing."""


def refuse_finished(run: RunDirectory, config: Config, world: World) -> None:
    """Before anything is read or written for a run that `run.resume` goes on with.

    Raises: Finished on all ranks where it has a whole checkpoint of its last step, or of a later
        one.
    """
    steps = config.train.steps
    newest = world.share("newest", lambda: str(max(map(step_of, listed(run.checkpoints)))))
    if int(newest) < steps:
        return
    step = find_checkpoint(run.path, world).manifest.step
    if world.share("is finished", lambda: str(step >= steps)) == "True":
        raise Finished(
            f"{run.path} is finished: step {step} of {steps}. Nothing to do; give --train.steps "
            f"above {step} to go on."
        )


def refuse_other_data(checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Check that a checkpoint was trained on these tokens.

    Raises: ConfigError.
    """
    if checkpoint.manifest.facts.data != tokens.key:
        raise ConfigError(
            f"{checkpoint.folder.parent.parent} was trained on other data or another tokenizer "
            "than the settings give now. Restore them, or start a new run."
        )


def refuse_other_run(checkpoint: Checkpoint, config: Config, world: World) -> None:
    """Check that these settings can go on from a checkpoint, as far as its manifest tells.

    Raises: ConfigError.
    """
    step = checkpoint.manifest.step
    if step >= config.train.steps:
        raise ConfigError(
            f"{checkpoint.folder.parent.parent} is already at step {step} of "
            f"{config.train.steps}. Give --train.steps above {step} to go on."
        )
    _refuse_other_order(checkpoint.manifest, config, world)
    before = _train_of(checkpoint.manifest.facts)
    if world.is_first and before and (changed := changed_plan(before, config.train, step)):
        log.warning("%s", changed)


def _train_of(facts: Facts) -> Train | None:
    """The settings of the training that saved a checkpoint; None where this version cannot read
    them.
    """
    try:
        return Train.model_validate(facts.config["train"])
    except (KeyError, ValidationError):
        return None


def _refuse_other_order(manifest: Manifest, config: Config, world: World) -> None:
    """The data's order is a function of seed, step, global batch and the samples' length: with
    others, samples would be repeated and skipped.
    """
    seq_len = manifest.facts.seq_len
    if config.data.seq_len != seq_len:
        raise ConfigError(
            f"data.seq_len is {config.data.seq_len}, but the checkpoint's samples had {seq_len} "
            "tokens. Leave it out, or start a new run."
        )
    train, was = config.train, manifest.facts.global_batch
    if train.seed != manifest.facts.seed:
        raise ConfigError(
            f"train.seed is {train.seed}, but the checkpoint's samples were drawn with "
            f"{manifest.facts.seed}. Leave it out, or start a new run."
        )
    replicas = _replicas(config, world)
    if train.micro_batch * train.accumulation * replicas == was:
        return
    fits = [n for n in range(1, was // replicas + 1) if was % (replicas * n) == 0]
    if not fits:
        raise ConfigError(
            f"The checkpoint's steps have {was} samples, which {replicas} replicas cannot share. "
            f"Start a number of ranks that gives a divisor of {was} replicas."
        )
    micro = max(n for n in fits if n <= train.micro_batch)
    flags = f"--train.accumulation {was // (replicas * micro)}"
    if micro != train.micro_batch:
        flags = f"--train.micro_batch {micro} {flags}"
    raise ConfigError(
        f"A step would have {train.micro_batch} x {train.accumulation} x {replicas} replicas = "
        f"{train.micro_batch * train.accumulation * replicas} samples, but has had {was} until "
        f"now: samples would be repeated or skipped. Keep them with {flags}."
    )


def _replicas(config: Config, world: World) -> int:
    degrees = config.parallel
    return data_parallel_degree(world.size, pp=degrees.pp, cp=degrees.cp, tp=degrees.tp)


def restore(
    state: TrainState,
    found: Checkpoint,
    wanted: Path,
    selections: tuple[Selection, ...],
    device: Device,
    world: World,
) -> Checkpoint:
    """Load what was found in `wanted`, or one before it; say what is not as it was when that was
    saved.
    """
    checkpoint = load_newest(state, wanted, found, world)
    log.info("resumed from %s", checkpoint.folder)
    manifest = checkpoint.manifest
    facts = manifest.facts
    before = {entry.op: str(entry) for entry in facts.backends}
    now = {entry.op: str(entry) for entry in backends_of(selections)}
    for what, value in (("torch", device.torch), ("the device", device_name(device))):
        if said := getattr(facts, what.removeprefix("the ")):
            before[what], now[what] = said, value
    for what in sorted(before.keys() | now.keys()):
        was_then, is_now = before.get(what, "not there"), now.get(what, "not there")
        if was_then != is_now and state.layout.mesh.world.is_first:  # it wrote down its own
            log.warning(
                "%s was %s until now, is %s from here on: the losses may differ in their "
                "last digits",
                *(what, was_then, is_now),
            )
    was, here = manifest.layout, degrees_of(state)
    if was != here:
        log.info("saved by %s, goes on with %s: sums are added in another order", was, here)
    return checkpoint


def device_name(device: Device) -> str:
    """As a checkpoint keeps it: plain words."""
    return re.sub(r"[^A-Za-z0-9_.+ -]", " ", f"{device.type} {device.name}")[:100]


def backends_of(selections: tuple[Selection, ...]) -> list[Backend]:
    """Who serves what, as a checkpoint keeps it."""
    return [
        Backend(
            op=selection.op,
            backend=selection.chosen.qualified_name,
            distribution=selection.chosen.provider.distribution,
            version=selection.chosen.provider.version,
            dtype=selection.requests[0].dtype,
        )
        for selection in selections
    ]
