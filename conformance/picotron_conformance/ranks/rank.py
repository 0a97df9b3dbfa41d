"""One rank: a process that loads the kernel, starts it, and answers one question after another."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

from picotron_conformance.check import WrongKernelError
from picotron_conformance.surroundings import snapshot
from picotron_core.files import create
from picotron_core.ops.comm import Comm, Group
from picotron_core.parallel.network import on_loopback
from picotron_core.registry.plugins import load_registry

WHERE = signal.SIGUSR1  # a rank that gets it writes down where it is


@dataclass(frozen=True, slots=True)
class Members:
    """A group and who is in it, in rank order."""

    ranks: tuple[int, ...]
    group: Group = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What a question is given: the kernel, started, and where this rank stands.

    large: with the sizes of the full profile.
    number: of the question, counted from the start of the world.
    events: a store for what ranks tell each other; empty when a question begins.
    outside: the state of the process before the kernel was loaded.
    """

    comm: Comm
    rank: int
    world: int
    device: torch.device
    folder: str
    timeout_s: float
    number: int
    events: Any
    outside: list[Any]
    dtype: torch.dtype = torch.float32
    large: bool = False
    seed: int = 0

    @property
    def all(self) -> Members:
        return Members(tuple(range(self.world)))

    def others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    def mark(self, event: str, content: str = "") -> None:
        """Tell the others that it has happened; each event once."""
        self.events.set(event, content)

    def sees(self, events: Sequence[str], *, within_s: float = 0) -> bool:
        """Whether all of them have happened, or do in that time."""
        end = time.monotonic() + within_s
        while not self.events.check(list(events)):
            if time.monotonic() >= end:
                return False
            time.sleep(0.002)
        return True

    def hears(self, event: str) -> str:
        """The content of an event, once it has happened."""
        return bytes(self.events.get(event)).decode()

    def start(self, store_name: str) -> None:
        """Start the kernel over a new store."""
        self.comm.start(
            store=FileStore(f"{self.folder}/{store_name}", self.world),
            rank=self.rank,
            world_size=self.world,
            device=self.device,
            timeout_s=self.timeout_s,
        )


@dataclass(frozen=True, slots=True)
class Question:
    """What all ranks of a world are asked: `ask` must be a function of a module, for it travels."""

    ask: Callable[[Rank], None]
    dtype: torch.dtype
    large: bool
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    kind: Literal["right", "wrong", "raised", "died"]
    detail: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank a process is to be. Plain data, for it travels."""

    plugin: str  # "" for the bundled backends
    qualified_name: str
    rank: int
    world: int
    device_type: str
    folder: str
    timeout_s: float


def main(connection: Connection, place: Place) -> None:
    """Start, say so, and answer until None comes or the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides when it is over
    torch.set_num_threads(1)
    os.environ.update(on_loopback())  # what the kernel opens is for the ranks of this machine
    stack = create(Path(place.folder) / f"stack-{place.rank}")  # open as long as the rank lives
    faulthandler.register(WHERE, stack, all_threads=False)
    try:
        started = _started(place)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the rank's answer
        connection.send(_raised(error))
        return
    connection.send(Answer("right"))
    try:
        for number, question in enumerate(iter(connection.recv, None), start=1):
            at = replace(
                started,
                number=number,
                events=PrefixStore(str(number), started.events),
                dtype=question.dtype,
                large=question.large,
                seed=question.seed,
            )
            connection.send(_answer(question, at))
    except EOFError:
        return
    started.comm.stop()


def _started(place: Place) -> Rank:
    outside = snapshot()
    registry = load_registry([place.plugin] if place.plugin else [])
    (kernel,) = (
        candidate.backend.load()
        for candidate in registry.candidates
        if (candidate.backend.op, candidate.qualified_name) == ("comm", place.qualified_name)
    )
    device = torch.device(place.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", place.rank)
        torch.cuda.set_device(device)
    at = Rank(
        comm=kernel,
        rank=place.rank,
        world=place.world,
        device=device,
        folder=place.folder,
        timeout_s=place.timeout_s,
        number=0,
        events=FileStore(f"{place.folder}/events", place.world),
        outside=outside,
    )
    at.comm.stop()  # nothing was started: no error
    at.start("kernel")
    return at


def _answer(question: Question, at: Rank) -> Answer:
    try:
        question.ask(at)
    except WrongKernelError as wrong:
        return Answer("wrong", wrong.detail, wrong.hint)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the rank's answer
        return _raised(error)
    return Answer("right")


def _raised(error: Exception) -> Answer:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}: {last.line}"
    return Answer("raised", f"{type(error).__name__}: {str(error).strip()[:400]} (at {where})")
