"""Saves under way: one at a time, written by a thread, moved on by all ranks together.

    step ends | start: copy | next steps, a thread writes | every rank's is done: rank 0's thread
              |             |                             | commits | that too is done: it exists

A rank's thread never speaks to other ranks. `move_on`, which all call after each step, finds out
whether all are done with their part; only then does anything follow from it.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from picotron_core.checkpoint.commit import (
    commit,
    discard,
    folder_of,
    prune,
    sweep,
    temporary_of,
)
from picotron_core.checkpoint.content import content, file_of, manifest_of
from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.header import FLOAT32_BYTES
from picotron_core.checkpoint.manifest import Facts, FileEntry, Manifest
from picotron_core.checkpoint.snapshot import Snapshot
from picotron_core.checkpoint.task import Outcome, Task
from picotron_core.checkpoint.write import write_file
from picotron_core.engine.state import TrainState
from picotron_core.errors import NotSavedError, RunError, reason
from picotron_core.parallel.world import World

SLOW_DISK = 20e6  # bytes a second
LOOK_S = 0.05  # between two looks at the other ranks while training waits
log = logging.getLogger("picotron")


@dataclass(slots=True, kw_only=True)
class Flight:
    """A save under way. number: of all that were tried, to tell one's words from another's.
    folder: where it is written. seconds: that it has taken so far, by the slowest rank.
    """

    number: int
    folder: Path
    manifest: Manifest
    task: Task
    stage: Literal["write", "commit", "prune"] = "write"
    seconds: float = 0.0
    held_s: float


class Saver:
    """Saves a state at the end of steps. Every rank has one, and calls it alike.

    saved: the step of the newest checkpoint, at first of that which the state came from.
    sound: names of those that are known to be whole, at first as above.
    pause_s: between the tries of the last save.
    skipped: saves that were not begun because the one before was under way.
    write_s: seconds that the last one took until it was there.
    waited_s: of these, those that training waited for it.
    held_s: seconds that training has waited for saves in all.
    total_bytes: of the last one, over all ranks.
    """

    def __init__(
        self,
        state: TrainState,
        checkpoints: Path,
        *,
        facts: Facts,
        keep: int,
        max_mb_per_s: float = 0.0,
        max_misses: int = 3,
        saved: int | None = None,
        sound: Iterable[str] = (),
        pause_s: float = 5.0,
        world: World | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.state, self.checkpoints, self.facts = state, checkpoints, facts
        self.keep, self.max_mb_per_s, self.max_misses = keep, max_mb_per_s, max_misses
        self.world, self.disk = world or World(), disk or Disk()
        self.saved, self.skipped, self.misses = saved, 0, 0
        self.write_s = self.held_s = self.waited_s = 0.0
        self.total_bytes = 0
        self.sound = set(sound)
        self.pause_s = pause_s
        self._snapshot = Snapshot()
        self._flight: Flight | None = None
        self._hurry = threading.Event()  # training waits: write as fast as it can be
        self._tried, self._why = 0, ""
        self._key = f"saver/{checkpoints}"  # of what this saver's ranks say to each other
        self._run = self.world.share(f"{self._key}/run", lambda: uuid.uuid4().hex[:8])
        if self.world.is_first:  # before the others hear of it, and may begin to write
            try:
                # A disk that is full refuses it even where the folder exists.
                if checkpoints.is_symlink() or not checkpoints.is_dir():
                    self.disk.make_folder(checkpoints)
            except OSError as error:
                raise RunError(
                    f"Cannot write the checkpoints of this run: {reason(error)}. Make "
                    f"{checkpoints} a folder that you can write to."
                ) from None
            sweep(self.disk, checkpoints)
        machines = self.world.gather(f"{self._key}/machine", socket.gethostname())
        self._ranks_here = machines.count(machines[self.world.rank])

    @property
    def under_way(self) -> bool:
        return self._flight is not None

    @property
    def expected_s(self) -> float:
        """What a save may take: as long as the last one, or as long as a slow disk would take to
        write what all ranks have.
        """
        numbers = sum(math.prod(shape) for shape in self.state.layout.shapes.values())
        kinds = 1 + len(self.state.moments)
        return self.write_s or FLOAT32_BYTES * kinds * numbers / SLOW_DISK

    def start(self) -> bool:
        """Begin to save the state as it is; False where one is under way, which is counted."""
        if self._flight:
            if self._flight.manifest.step == self.state.step:  # an update was skipped meanwhile
                return False
            self.skipped += 1
            self._warn(
                f"step {self.state.step} is not saved: step {self._flight.manifest.step} is still "
                f"being written ({self.skipped} skipped so far)"
            )
            return False
        begin, held_s = time.monotonic(), self.held_s
        state = self.state
        state.weights.wait()
        head, numbers = content(state)
        self._tried += 1
        folder = temporary_of(self.checkpoints, state.step, self._run, self._tried)
        has_room = self._snapshot.make_room(numbers, ranks_here=self._ranks_here)
        # Where one rank must wait for its disk all do: in the next step's collectives they would,
        # after `run.timeout_s`, take it for dead.
        (all_wait,) = self.move_on(not has_room)
        if all_wait:
            self._snapshot.give_back()  # or it would lack what the others hold for nothing
        else:
            self._snapshot.take(numbers)

        def write() -> str:
            try:
                self.disk.make_folder(folder)
            except FileNotFoundError:
                raise RunError(
                    f"{self.checkpoints} is not there: it was deleted, or not every rank sees the "
                    "same files. Put --run.dir on a disk that all machines share."
                ) from None
            of_step = numbers if all_wait else [self._snapshot.wait()]
            path = folder / file_of(self.world.rank)
            limit = 0.0 if all_wait else self.max_mb_per_s
            entry = write_file(
                self.disk, path, head, of_step, max_mb_per_s=limit, hurry=self._hurry
            )
            return entry.model_dump_json()

        flight = self._flight = Flight(
            number=self._tried,
            folder=folder,
            manifest=manifest_of(state, self.facts),
            task=Task(write),
            seconds=time.monotonic() - begin,
            held_s=held_s,
        )
        if all_wait:
            self._warn("too little memory to copy the state: training waits for the disk")
            while self._flight and flight.stage == "write":
                flight.task.join(LOOK_S)
                self.move_on()
        self.held_s = held_s + time.monotonic() - begin
        return True

    def move_on(self, *mine: bool) -> tuple[bool, ...]:
        """After a step: let the save under way go on where all ranks can.

        Args:
            mine: what this rank wants to know of all, e.g. whether it was asked to stop.

        Returns: of each, whether any rank said so.
        """
        busy = self._flight is not None and self._flight.task.is_alive()
        world = self.state.layout.mesh.world
        device = self.state.device if world.size > 1 else None  # alone there is nothing to wait for
        flags = torch.tensor([float(flag) for flag in (busy, *mine)], device=device)
        # over all ranks: all_reduce(max), the one word that a step costs, and a save
        world.all_reduce(flags, op="max")
        with world.watchdog.waiting("all_reduce over world"):  # a wait for the device
            busy, *said = (bool(flag) for flag in flags.tolist())
        if self._flight and not busy:
            begin = time.monotonic()
            self._go_on(self._flight)
            self.held_s += time.monotonic() - begin
        return tuple(said)

    def give_up(self) -> None:
        """Raises: NotSavedError on all ranks after `max_misses` saves in a row that failed."""
        if self.misses >= self.max_misses:
            raise self._refusal()

    def finish(self) -> bool:
        """Wait until nothing is under way. Returns whether the state as it is now is saved.

        Raises: as `give_up`.
        """
        self._land()
        self.give_up()
        return self.saved == self.state.step

    def save(self, *, left_s: float = math.inf) -> Path:
        """Save the state and wait for it. Where the disk refuses, `max_misses` tries are made,
        however many saves failed before: it may have room again, and what is not saved is lost.

        Args:
            left_s: seconds after which no other try is begun.

        Raises: NotSavedError where the disk refuses; the earlier checkpoints are then untouched.
        """
        until, tries = time.monotonic() + left_s, 0
        self._land()
        while self.saved != self.state.step:
            if tries:
                # All ranks try alike, whichever clock is ahead.
                (late,) = self.move_on(time.monotonic() + self.pause_s > until)
                if late or tries >= self.max_misses:
                    raise self._refusal()
                time.sleep(self.pause_s)
            tries += 1
            self.start()
            self._land()
        return folder_of(self.checkpoints, self.state.step)

    def _land(self) -> None:
        """Until nothing is under way. Ranks look at each other meanwhile: one that waited in a
        collective for another's disk would, after `run.timeout_s`, take it for dead.
        """
        self._hurry.set()
        while self._flight:
            self._flight.task.join(LOOK_S)
            self.move_on()
        self._hurry.clear()

    def _go_on(self, flight: Flight) -> None:
        """All ranks are done with what they did: hear how it went."""
        mine = json.dumps(asdict(flight.task.outcome()))
        told = self.world.gather(f"{self._key}/{flight.number}/{flight.stage}", mine)
        outcomes = [Outcome(**json.loads(text)) for text in told]
        flight.seconds += max(outcome.seconds for outcome in outcomes)
        wrong = [(rank, outcome.why) for rank, outcome in enumerate(outcomes) if outcome.why]
        if flight.stage == "prune":
            self._flight = None
            if wrong:
                self._warn(f"older checkpoints are left: {wrong[0][1]}")
        elif wrong:
            rank, why = wrong[0]
            where = f" on rank {rank}" if self.world.size > 1 else ""
            self._missed(flight, f"{why}{where}")
        elif flight.stage == "write":
            files = {
                file_of(rank): FileEntry.model_validate_json(outcome.answer)
                for rank, outcome in enumerate(outcomes)
            }
            flight.manifest = flight.manifest.model_copy(update={"files": files})
            flight.stage, flight.task = "commit", Task(lambda: self._commit(flight))
        else:
            self._saved(flight)
            flight.stage, flight.task = "prune", Task(lambda: self._prune(flight))

    def _commit(self, flight: Flight) -> str:
        if self.world.is_first:
            final = folder_of(self.checkpoints, flight.manifest.step)
            commit(self.disk, flight.folder, final, flight.manifest)
            self.sound.add(final.name)
        return ""

    def _prune(self, flight: Flight) -> str:
        """May read older checkpoints, which takes as long as it takes: the save is done before."""
        if self.world.is_first:
            newest = folder_of(self.checkpoints, flight.manifest.step)
            prune(self.disk, self.checkpoints, newest, keep=self.keep, sound=self.sound)
            discard(self.disk, flight.folder)  # the one that was replaced
        return ""

    def _saved(self, flight: Flight) -> None:
        self.misses = 0
        self.saved = flight.manifest.step
        self.write_s = flight.seconds
        self.waited_s = self.held_s - flight.held_s
        self.total_bytes = flight.manifest.bytes

    def _missed(self, flight: Flight, why: str) -> None:
        self._flight = None
        self.misses += 1
        if self.world.is_first:
            discard(self.disk, flight.folder)
        self._why = f"{folder_of(self.checkpoints, flight.manifest.step)}: {why}"
        at_risk = self.state.step - (self.saved or 0)
        self._warn(
            f"not saved: {self._why}. Earlier checkpoints are untouched, {at_risk} steps are at "
            "risk; the next save tries again"
        )

    def _warn(self, text: str) -> None:
        if self.world.is_first:  # all ranks know the same
            log.warning("%s", text)

    def _refusal(self) -> NotSavedError:
        return NotSavedError(
            f"Cannot write the checkpoint {self._why}. Saves that failed in a row: {self.misses}. "
            "Free space or give another --run.dir; earlier checkpoints are untouched."
        )
