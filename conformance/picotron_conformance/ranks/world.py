"""Starting the ranks of a world, asking them, and ending them whatever they do."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from picotron_conformance.check import WrongKernelError
from picotron_conformance.ranks.rank import WHERE, Answer, Place, Question, main
from picotron_core.parallel.private_folder import make_private_folder
from picotron_core.registry.types import Candidate

PRELOADED = ("rank", "values", "timing", "groups", "misuse")
LIMIT_S = 40.0  # for one question, all ranks together
GRACE_S = 0.5  # for the others, once a rank's answer is bad: they may wait for it for ever


class RankError(Exception):
    """A rank raised, or its process ended."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a running world can be asked about."""

    candidate: Candidate
    world: int
    device_type: str
    timeout_s: float


# At most one world runs; it is kept, for to start it takes longer than most questions.
_running: dict[Key, World] = {}
_broken: dict[Key, Exception] = {}  # could not start, and would not a second time


def ask(key: Key, question: Question, *, last: bool = False) -> None:
    """All ranks of the world answer; they are started first where they do not run.

    A world that gave a bad answer is ended, for its ranks may be anywhere; so it is after `last`.

    Raises: WrongKernelError; RankError where a rank raised or died; TimeoutError where ranks hang.
    """
    if key in _broken:
        raise _broken[key]
    if key not in _running:
        end_all()
        try:
            _running[key] = World(key)
        except Exception as error:
            _broken[key] = error
            raise
    world = _running[key]
    try:
        world.ask(question)
    except BaseException:  # the watchdog's or the user's interrupt as well
        last = True
        raise
    finally:
        if last:
            world.kill()
            del _running[key]


@atexit.register
def end_all() -> None:
    """Let the ranks that run leave in order."""
    while _running:
        _running.popitem()[1].end()


class World:
    """The processes of all ranks. They die with this one, or when their pipe closes."""

    def __init__(self, key: Key) -> None:
        self._folder = make_private_folder()
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        # A server that has imported torch once forks every rank, and has no threads to lose.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"{__package__}.{name}" for name in PRELOADED])
        provider = key.candidate.provider
        try:
            for rank in range(key.world):
                place = Place(
                    plugin="" if provider.bundled else provider.plugin,
                    qualified_name=key.candidate.qualified_name,
                    rank=rank,
                    world=key.world,
                    device_type=key.device_type,
                    folder=str(self._folder.path),
                    timeout_s=key.timeout_s,
                )
                here, there = context.Pipe()
                process = context.Process(target=main, args=(there, place), daemon=True)
                self._connections.append(here)
                self._processes.append(process)
                with _no_main_module():
                    process.start()
                there.close()
            self._judge(self._collect())
        except BaseException:
            self.kill()
            raise

    def ask(self, question: Question) -> None:
        self._send(question)
        self._judge(self._collect())

    def end(self) -> None:
        self._send(None)
        for process in self._processes:
            process.join(2)
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()
        self._folder.leave()

    def _send(self, message: Question | None) -> None:
        for connection in self._connections:
            with suppress(OSError):  # to one that has died; its silence will tell
                connection.send(message)

    def _collect(self) -> dict[int, Answer]:
        """The answers by rank, in the order in which they came; who hangs is not in it."""
        answers: dict[int, Answer] = {}
        end = time.monotonic() + LIMIT_S
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for connection, rank in [item for item in waiting.items() if item[0] in ready]:
                del waiting[connection]
                answers[rank] = self._answer(rank)
                if answers[rank].kind != "right":
                    end = min(end, time.monotonic() + GRACE_S)
        return answers

    def _answer(self, rank: int) -> Answer:
        try:
            answer = self._connections[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            return Answer("died", f"its process ended with exit code {code}")
        assert isinstance(answer, Answer)
        return answer

    def _judge(self, answers: dict[int, Answer]) -> None:
        """A rank that errs makes others raise, and a rank that dies even more: the cause first."""
        world = len(self._processes)
        for kind in ("wrong", "died", "raised"):
            for rank, answer in answers.items():
                if answer.kind == kind:
                    detail = f"rank {rank} of {world}: {answer.detail}"
                    if kind == "wrong":
                        raise WrongKernelError(detail, hint=answer.hint)
                    raise RankError(detail)
        hanging = [rank for rank in range(world) if rank not in answers]
        if hanging:
            raise TimeoutError(
                f"no answer from {len(hanging)} of {world} ranks after {LIMIT_S:g} s: "
                + "; ".join(self._where(hanging))
            )

    def _where(self, hanging: Sequence[int]) -> Iterator[str]:
        """The innermost Python calls of ranks that still run."""
        for rank in hanging:
            pid = self._processes[rank].pid
            if pid is not None:
                os.kill(pid, WHERE)
        time.sleep(GRACE_S)
        for rank in hanging:
            stack = (self._folder.path / f"stack-{rank}").read_text(encoding="utf-8")
            frames = re.findall(r'File "(?:.*/)?(.+)", line (\d+) in (\w+)', stack)
            calls = " in ".join(f"{file}:{line} {name}" for file, line, name in frames[:3])
            yield f"rank {rank} is at {calls or 'an unknown place'}"


@contextmanager
def _no_main_module() -> Iterator[None]:
    """multiprocessing would run the caller's main module again in every rank: pytest, or a script
    without `if __name__ == "__main__"`. A rank has no use for it.
    """
    kept = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = kept
