"""`picotron train --nproc N`: the same command on N ranks of this machine."""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from picotron_core.cli.model import draft_of, replicas_of
from picotron_core.cli.output import hurry
from picotron_core.cli.stop import (
    INTERRUPTED,
    REQUEUE,
    SAME_S,
    SIGNALS,
    Stopped,
    stays_ignored,
)
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError, RunError, reason
from picotron_core.parallel import network
from picotron_core.parallel.folder_store import read_value, write_value
from picotron_core.parallel.lifeline import Starter, starter
from picotron_core.parallel.watchdog import START_UP
from picotron_core.parallel.world import make_ready
from picotron_core.schema import Config

LEAST_MOST, RANKS_PER_CORE = 64, 4  # --nproc: more would not get through their start
LOOK_S = 0.05
SAVE_S = 600.0  # what a save may take, once the ranks were asked to stop, before they are killed
# Before the first step there is nothing to save, and a tokenizer that is being trained does not
# react to signals.
PREPARING_S = {signal.SIGINT: 0.8}
PREPARING_OTHERWISE_S = 4.0
AGAIN_S = 5.0  # after the second Ctrl-C, which asks to quit without saving
LEAVE_S = 30.0  # what the others may take once a rank has failed
ASKED_TO_STOP = (REQUEUE, INTERRUPTED)
log = logging.getLogger("picotron")


def launch(
    nproc: int, arguments: Sequence[str], config: Config, *, resume: RunDirectory | None = None
) -> int:
    """Start `picotron ARGUMENTS` as ranks 0 to N - 1, and wait for them.

    Args:
        config: what the arguments say, for a layout that cannot be is reported here, once, and not
            by every rank.
        resume: the run that the arguments go on with.

    Returns: the exit code of the rank that failed first, that of all that were asked to stop, or 0.
    Raises: RunError where a signal ended a rank, and Stopped where ranks were killed that were
        asked to stop, for they could not say it themselves; ConfigError under torchrun, which
        starts ranks of its own, and for that layout.
    """
    make_ready(nproc)
    cores = os.cpu_count() or 1
    if nproc > (most := max(LEAST_MOST, RANKS_PER_CORE * cores)):
        raise ConfigError(
            f"--nproc {nproc}: at most {most} ranks on this machine of {cores} cores. One for each "
            "GPU, or a few on a CPU, is usual; torchrun starts more, on several machines."
        )
    replicas_of(config, draft_of(config, resume), nproc)
    for sentence in network.ignored_interfaces(os.environ):
        log.warning("%s", sentence)
    with starter() as start, _signals_noted() as signals:
        ranks = Ranks(start.folder.path)
        try:
            for rank in range(nproc):
                if signals:
                    break
                ranks.add(_start(rank, nproc, arguments, start))
            return _wait_for(ranks, signals)
        finally:
            ranks.kill()
            gc.freeze()  # else the interpreter looks through all of torch before it exits: a second


@dataclass(slots=True)
class Ranks:
    """The processes, by rank. Each leads a session of its own: a terminal's Ctrl-C reaches the
    launcher alone, which passes it on, and no rank gets it twice.

    ended: rank and exit code (-N: ended by signal N), in the order in which they were seen to end.
    """

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: list[tuple[int, int]] = field(default_factory=list)

    def add(self, process: subprocess.Popen[bytes]) -> None:
        rank = len(self.processes)
        self.processes.append(process)
        # By this, others find a rank that is stopped before it has joined: see `Seen.wake`.
        heart = json.dumps([0, "", platform.node(), process.pid])
        write_value(self.folder, f"alive/{rank}", heart)

    def are_running(self) -> bool:
        before = {rank for rank, _ in self.ended}
        new = [
            (rank, code)
            for rank, process in enumerate(self.processes)
            if rank not in before and (code := process.poll()) is not None
        ]
        # Who was killed is the cause of what the others say.
        self.ended += sorted(new, key=lambda one: (one[1] >= 0, one[0]))
        return len(self.ended) < len(self.processes)

    def send(self, number: int) -> None:
        """Pass a signal on; a rank that is still importing has nothing to end in order."""
        for process, place in zip(self.processes, self._places(), strict=True):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL if place == "" else number)

    def have_begun(self) -> bool:
        """Whether a rank has come to its first step."""
        return not all(
            place == "" or (place and place.startswith(f"in {START_UP},"))
            for place in self._places()
        )

    def _places(self) -> list[str | None]:
        """Where each rank is, as others see it: "" of one that has not joined, None where it cannot
        be read, as when the folder was deleted: the rank may have steps to save.
        """
        hearts: list[bytes | None] = [None] * len(self.processes)
        with suppress(OSError):
            hearts = [read_value(self.folder, f"alive/{n}") for n in range(len(self.processes))]
        return [json.loads(heart)[1] if heart else None for heart in hearts]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _start(
    rank: int, nproc: int, arguments: Sequence[str], start: Starter
) -> subprocess.Popen[bytes]:
    variables = {name: value for name, value in os.environ.items() if name not in _TORCHRUNS}
    variables |= network.on_loopback() | start.variables
    variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    variables |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "picotron_core.cli", *arguments],
            env=variables,
            pass_fds=start.descriptors,
            start_new_session=True,
        )
    except OSError as error:
        raise RunError(
            f"Rank {rank} of {nproc} cannot be started: {reason(error)}. Start fewer with --nproc."
        ) from None


# Of a run that these ranks are no part of.
_TORCHRUNS = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"}


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """While this lasts, signals to stop are appended to the list, but for those that were ignored
    from the start and stay so, here and in the ranks.
    """
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)

    former = {}
    for number in (*SIGNALS, signal.SIGQUIT):
        if not stays_ignored(number):
            former[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _wait_for(ranks: Ranks, signals: list[int]) -> int:
    asked: list[int] = []
    failed_at = terminated_at = asked_at = 0.0
    while True:
        now = time.monotonic()
        while signals:
            number = signals.pop(0)
            hurry()
            if signal.SIGINT in asked and number == signal.SIGINT and now < asked_at + SAME_S:
                continue  # the same Ctrl-C
            ranks.send(number)
            asked.append(number)
            asked_at = now
        if not ranks.are_running():
            return _outcome(ranks.ended, asked)
        code = next((code for _, code in ranks.ended if code), 0)
        failed_at = failed_at or (now if code else 0.0)
        if asked:
            over = now > asked_at + _patience(asked, ranks)
        elif failed_at and not terminated_at:
            over = False
            if code not in ASKED_TO_STOP or now > failed_at + LEAVE_S:
                ranks.send(signal.SIGTERM)
                terminated_at = now
        else:
            over = bool(terminated_at) and now > terminated_at + LEAVE_S
        if over:
            ranks.kill()
        time.sleep(LOOK_S)


def _patience(asked: Sequence[int], ranks: Ranks) -> float:
    """For how long the ranks may go on after the last signal."""
    if asked.count(signal.SIGINT) > 1:
        return AGAIN_S
    if ranks.have_begun():
        return SAVE_S
    return PREPARING_S.get(signal.Signals(asked[-1]), PREPARING_OTHERWISE_S)


def _outcome(ended: Sequence[tuple[int, int]], asked: Sequence[int]) -> int:
    """The exit code of the launcher."""
    if not asked:
        rank, code = next((one for one in ended if one[1]), (0, 0))
        if code < 0:
            raise RunError(f"Rank {rank} died of {_name_of(-code)}; the others were stopped.")
        return code
    codes = {code for _, code in ended}
    if failed := [code for code in codes if code > 0 and code not in ASKED_TO_STOP]:
        return max(failed)
    if codes == {0}:  # they were done
        return 0
    if asked[0] == signal.SIGQUIT:
        return 128 + signal.SIGQUIT
    stopped = Stopped(asked[0])
    if all(code < 0 for code in codes):  # no rank could say it
        raise stopped
    return stopped.exit_code


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """A command line that asks for no ranks."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
