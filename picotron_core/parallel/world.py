"""The processes of a run, by the variables that torchrun sets."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from picotron_core.errors import ConfigError, LostRankError, RunError, is_out_of_memory, reason
from picotron_core.parallel import lifeline
from picotron_core.parallel.network import advice
from picotron_core.parallel.rendezvous import (
    choose_interfaces,
    meet_in_folder,
    meet_over_tcp,
    place_of,
)
from picotron_core.parallel.watchdog import Watchdog

POLL_S = 0.5  # the longest between two looks for another rank's word
TURNS = 8  # questions about the time: the quickest answer counts


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among all.

    store: torch's rendezvous store; None for a single process.
    folder: private, of all ranks, and removed at their end; None where there is none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout_s: float = 600.0
    store: Any = field(default=None, repr=False)
    folder: Path | None = None
    watchdog: Watchdog = field(default_factory=Watchdog, repr=False)
    _gathered: Counter[str] = field(default_factory=Counter, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes the run's files."""
        return self.rank == 0

    def share(self, key: str, make: Callable[[], str]) -> str:
        """Rank 0's value of `make()`, on every rank."""
        if self.size == 1:
            return make()
        if self.is_first:
            self._tell(key, make())
        return self._wait_for(key)

    def gather(self, key: str, value: str) -> list[str]:
        """Every rank's value, in rank order. All ranks call it alike, with a key as often as they
        like: each call has keys of its own in the store.
        """
        if self.size == 1:
            return [value]
        self._gathered[key] += 1
        key = f"{key}#{self._gathered[key]}"
        with self.watchdog.waiting(f"the wait for {key!r}", by_itself=True):
            self.store.set(f"{key}/{self.rank}", value)
            values = [self._wait_for(f"{key}/{rank}") for rank in range(self.size)]
            # Rank 0 may keep the store: it must not leave, whatever it read, before all have read.
            if self.store.add(f"{key}/read", 1) == self.size:
                self.store.set(f"{key}/all", "read")
            self._wait_for(f"{key}/all")
        return values

    def clock_offset(self, key: str) -> tuple[int, int]:
        """How far this rank's `time.monotonic_ns` is ahead of the first rank's, and by how much
        that may be wrong: half of the time from a question to its answer (Cristian 1989,
        doi:10.1007/BF01784024). All ranks call it alike.
        """
        offsets = [(0, 0)] if self.is_first else []  # (error, offset)
        for rank in range(1, self.size):
            for turn in range(TURNS):
                question, answer = f"{key}/{rank}/{turn}/asked", f"{key}/{rank}/{turn}/told"
                if self.is_first:
                    self._wait_for(question, pause=False)
                    self._tell(answer, str(time.monotonic_ns()))
                elif rank == self.rank:
                    asked = time.monotonic_ns()
                    self._tell(question, "")
                    theirs = int(self._wait_for(answer, pause=False))
                    heard = time.monotonic_ns()
                    offsets.append(((heard - asked) // 2, (heard + asked) // 2 - theirs))
        error, offset = min(offsets)
        return offset, error

    def leave(self) -> None:
        """After the last collective: no rank ends well unless all have come to their ends."""
        if self.size == 1:
            return
        self.gather("the end", "")
        if self.is_first:  # the last to go, as it may keep the store
            self._wait_for("left")
        else:
            with self.watchdog.waiting("the store's answer to 'leaving'"):
                if self.store.add("leaving", 1) == self.size - 1:
                    self.store.set("left", "")
        self.watchdog.stop()

    def _tell(self, key: str, value: str) -> None:
        """Even this is a wait: the store of a stopped process takes a word and never answers."""
        with self.watchdog.waiting(f"the store's answer to {key!r}"):
            self.store.set(key, value)

    def _wait_for(self, key: str, *, pause: bool = True) -> str:
        what = f"the wait for {key!r}"
        with self.watchdog.waiting(what, by_itself=True):
            start = time.monotonic()
            while not self.store.check([key]):  # `wait` would warn of every poll that finds nothing
                waited = time.monotonic() - start
                if waited > self.timeout_s or self.watchdog.heard:
                    raise LostRankError(self.watchdog.explain(what, late=waited > self.timeout_s))
                time.sleep(min(POLL_S, 0.005 + waited / 10) if pause else 0)
            return bytes(self.store.get(key)).decode()


@contextmanager
def forming_groups(world: World) -> Iterator[None]:
    """Around the first words of a transport.

    Raises: LostRankError where another rank is the reason that it fails; else RunError with all
        that the transport says.
    """
    try:
        with world.watchdog.waiting("the forming of groups"):
            yield
    except (RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        raise RunError(
            f"Rank {world.rank} cannot form a group with the others: {reason(error)}. "
            f"{advice(os.environ, one_machine=world.folder is not None)}"
        ) from error


def is_rank() -> bool:
    """Whether this process was started as one of several."""
    return "WORLD_SIZE" in os.environ


def make_ready(ranks: int) -> None:
    """Before ranks are started here: share the cores out, for each would take them all.

    Raises: ConfigError where this process is a rank already.
    """
    if is_rank():
        raise ConfigError(
            "--nproc starts the ranks itself, but WORLD_SIZE is set: leave out --nproc under "
            "torchrun, or unset WORLD_SIZE."
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))


def join(*, timeout_s: float) -> World:
    """Meet the other processes; a lone process where torchrun's variables are not set.

    Raises: ConfigError where they are set in part, or to what cannot be; RunError where the others
        cannot be met.
    """
    line = lifeline.attach()
    if line:
        line.patience_s = timeout_s
    place = place_of(os.environ, in_folder=line is not None)
    if place is None:
        return World(timeout_s=timeout_s)
    choose_interfaces(place, in_folder=line is not None)
    timeout = timedelta(seconds=timeout_s)
    if line:
        store, hearts, lost = meet_in_folder(place, line, timeout)
    else:
        store, hearts, lost = meet_over_tcp(place, timeout)
    watchdog = Watchdog(
        rank=place.rank,
        size=place.size,
        timeout_s=timeout_s,
        store=hearts,
        lost=lost,
        keeps_store=place.rank == 0 and line is None,
    )
    watchdog.start()
    return World(
        rank=place.rank,
        size=place.size,
        local_rank=place.local_rank,
        timeout_s=timeout_s,
        store=store,
        folder=line.folder.path if line else None,
        watchdog=watchdog,
    )
