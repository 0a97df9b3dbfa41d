"""No rank waits for ever, and each says for whom: which rank is gone, in which step and collective.

    rank 0 | step 7: all_reduce over dp .... fails, or is late -> looks who is silent: rank 1
    rank 1 | step 7: killed, stopped, raised, or its machine is gone
    rank 2 | step 7: all_reduce over tp .... hears from the store why rank 0 stops

A transport says little. gloo tells that a connection is closed or a time over, which in the end all
ranks see of each other; NCCL tells nothing, its collectives cannot be left, it aborts the process,
and whoever asks for more than a GPU's queue holds is stuck in what comes next. So each rank has two
threads. The *heartbeat* writes into the store where the rank is, and reads from it whether another
has failed, and whether the next one's heart beats. The *watchdog* asks nobody, for the store may be
what is dead: it ends the process where the work does not come back by itself.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import platform
import select
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from types import TracebackType
from typing import Any

from picotron_core.errors import LostRankError
from picotron_core.parallel.lifeline import end_now
from picotron_core.parallel.seen import Seen, answer_of, obituary

POLL_S = 0.5  # between two heartbeats: how soon a rank hears that another has failed
SILENT_S = 2.0  # whoever's heart does not beat for so long, while others look, is gone
LATE_S = 2.0  # what a wait that ends by itself has, after the timeout, to do so
# How much later a transport's own timeout is. NCCL aborts the process with it, so by then two looks
# (SILENT_S, and what the store's silence costs) and a word to the others must be over.
TRANSPORT_S = 8.0
GRACE_S = 2.0  # what a rank has, once another has failed, to leave by itself
FAILED = "failed"
START_UP = "start-up"  # where a rank is before its first step


@dataclass(slots=True, kw_only=True)
class Watchdog:
    """Of this rank. Without a store, as for a single process, it watches nothing.

    store: a connection to it that nobody else uses.
    lost: what is said where the store is lost.
    keeps_store: the store ends with this process, so others have to read it first.
    heard: why another rank has failed; "" while none has.
    """

    rank: int = 0
    size: int = 1
    timeout_s: float = math.inf
    store: Any = None
    lost: str = "the store does not answer."
    keeps_store: bool = False
    heard: str = ""
    _place: str = START_UP
    _until: float = 0.0  # it may go on, even if another rank fails
    _waits: Waiting | None = None  # the innermost, where one is within another
    _over: float = math.inf  # when it was heard that the run is over
    _quiet_s: float = 0.0  # for how long the next rank's heart has not beaten
    _lost: float = math.inf  # since when there is no connection to the store
    _code: int | None = None  # this rank has failed, and is to leave with it
    _signals: socket.socket | None = None  # what signals come, while the work is in C++
    _speaks: bool = False  # the watchdog may be about to end the process: the work is not to speak
    _stopped: Event = field(default_factory=Event)
    _threads: list[Thread] = field(default_factory=list)

    def start(self) -> None:
        """Called by the main thread."""
        self._signals, written = socket.socketpair()
        written.setblocking(False)
        signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
        for target in (self._beat, self._watch):
            thread = Thread(target=target, daemon=True)
            thread.start()
            self._threads.append(thread)
        # A thread that comes out of C++ while Python shuts down would abort the process.
        atexit.register(self.stop)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * POLL_S)

    def enter(self, place: str, *, patience_s: float = 0.0) -> None:
        """Note what this rank is about to do.

        Args:
            place: as in "rank 1 stops in PLACE".
            patience_s: what it may take, as to write a file, even if another rank fails.
        """
        self._place, self._until = place, time.monotonic() + patience_s

    def waiting(self, what: str, *, since: float | None = None, by_itself: bool = False) -> Waiting:
        """While this rank waits for others, as in "rank 1 stops in step 7, in WHAT". An error of
        the transport within becomes one that names who is missing.

        Args:
            since: by `time.monotonic`, where what it waits for began earlier: from when a
                transport counts.
            by_itself: the wait ends at the timeout, unless the store does not answer.
        """
        limit_s = self.timeout_s + (LATE_S if by_itself else 0.0)
        return Waiting(self, what, time.monotonic() if since is None else since, limit_s)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one will not come. What then holds it up is not waited
        for: gloo's groups, for one, wait in their destructors for all that is on its way.
        """
        if self.size == 1 or self._code is not None:
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by a launcher: there is a word to say first
        words = str(error)
        if not isinstance(error, LostRankError):
            kind = "" if hasattr(error, "exit_code") else f"{type(error).__name__}: "
            words = f"Rank {self.rank} failed in {self._place}: {kind}{error}"
            error.add_note(f"That was rank {self.rank}, in {self._place}.")
        self._tell(words)
        if self.keeps_store:
            time.sleep(2 * POLL_S)
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        self._code = int(getattr(error, "exit_code", code))
        self._over = min(self._over, time.monotonic())
        atexit.register(end_now, self._code)

    def explain(self, what: str, *, late: bool) -> str:
        """Why this rank cannot go on with `what`; "" where no rank is the reason. The others are
        told who is gone.

        Args:
            late: the timeout is over, so it is an error even if every rank is there.
        """
        where = f"Rank {self.rank} stops in {self._place}{what and f', in {what}'}"
        silent = None if self.heard else self._silent()
        if self.heard:
            return f"{where}, for another failed. {self.heard}"
        if silent is None:
            return f"{where}: {self.lost}"
        gone = {rank: one for rank, one in silent.items() if one.silent}
        if gone:
            words = f"{where}: {obituary(gone)} See its output."
            self._tell(words)  # first, for once awake it is not silent to those who look later
            for one in gone.values():
                one.wake()
            return words
        if not late:
            return ""
        places = "; ".join(f"rank {rank} {one.where}" for rank, one in silent.items())
        return (
            f"{where}: it took longer than {self.timeout_s:g} s. All ranks are alive: {places}. "
            "If one is just slow, give a longer --run.timeout_s."
        )

    def _silent(self) -> dict[int, Seen] | None:
        """The other ranks, by two looks at their hearts; None where the store does not answer."""
        return answer_of(self._look_twice, within_s=SILENT_S + 4 * POLL_S)

    def _look_twice(self) -> dict[int, Seen]:
        before = self._look()
        end = time.monotonic() + SILENT_S
        while not self.heard and time.monotonic() < end:
            time.sleep(POLL_S / 5)
        after = self._look()
        self._listen()
        return {
            rank: Seen.of(after[rank], silent=after[rank] == before[rank])
            for rank in range(self.size)
            if rank != self.rank
        }

    def _look(self) -> list[bytes]:
        keys = [f"alive/{rank}" for rank in range(self.size)]
        if self.store.check(keys):
            return list(self.store.multi_get(keys))
        return [self._heart(rank) for rank in range(self.size)]

    def _tell(self, words: str) -> None:
        """The first to say it is who is heard."""
        answer_of(lambda: self.store.compare_set(FAILED, "", words), within_s=2 * POLL_S)

    def _beat(self) -> None:
        from torch.distributed import DistError

        beat, heart, looked = 0, b"", time.monotonic()
        with suppress(DistError):  # the store is gone
            while not self._stopped.wait(POLL_S if beat else 0):
                beat += 1
                try:
                    self._say(beat)
                    self._listen()
                    before, since = heart, looked
                    heart, looked = self._heart((self.rank + 1) % self.size), time.monotonic()
                except DistError:
                    if not hasattr(self.store, "clone"):  # torch 2.8
                        raise
                    self._lost = time.monotonic()
                    self.store = self.store.clone()  # which tries for some time
                    self._lost = math.inf
                    continue
                # Of a time in which this rank was frozen a moment counts: others wake up later.
                passed_s = min(looked - since, 2 * POLL_S)
                self._quiet_s = self._quiet_s + passed_s if heart == before else 0.0

    def _say(self, beat: int) -> None:
        waits = self._waits  # once: the main thread may come back meanwhile
        where = f"in {self._place}, {f'in {waits.what}' if waits else 'at work'}"
        seen = [beat, where, platform.node(), os.getpid()]
        self.store.set(f"alive/{self.rank}", json.dumps(seen))

    def _heart(self, rank: int) -> bytes:
        key = f"alive/{rank}"
        return bytes(self.store.get(key)) if self.store.check([key]) else b""

    def _listen(self) -> None:
        if not self.heard and self.store.check([FAILED]):
            self._over = min(self._over, time.monotonic())
            self.heard = bytes(self.store.get(FAILED)).decode()

    def _watch(self) -> None:
        told_to_end = False
        while not self._stopped.is_set():
            told_to_end |= signal.SIGTERM in self._signals_within(POLL_S)
            now, waits = time.monotonic(), self._waits
            waited_s = now - waits.since if waits else 0.0
            over = now > self._over + GRACE_S
            if self._code is not None and over:
                end_now(self._code)
            elif (over and (waits or now > self._until)) or (waits and waited_s > waits.limit_s):
                self._end(waits, late=True)
            else:
                silence_s = max(self._quiet_s, now - self._lost)
                stuck = silence_s > self.timeout_s and now > self._until  # though it waits not
                # By a launcher, perhaps, that saw another rank die.
                left_alone = told_to_end and waited_s > LATE_S
                if stuck or left_alone:
                    self._end(waits, late=False)

    def _signals_within(self, seconds: float) -> bytes:
        assert self._signals
        ready, _, _ = select.select([self._signals], [], [], seconds)
        return self._signals.recv(64) if ready else b""

    def _end(self, waits: Waiting | None, *, late: bool) -> None:
        """Leave without the work, if it does not come back and there is a reason to say."""
        try:
            words = self.explain(waits.what if waits else "", late=late)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not leave the rank unwatched
            words = f"Rank {self.rank} stops in {self._place}: {type(error).__name__}: {error}"
        self._speaks = True
        if words and self._code is None and self._waits is waits:
            self._tell(words)
            os.write(2, f"error: {words}\n".encode())  # Python's buffers may be locked by the work
            if self.keeps_store:
                time.sleep(2 * POLL_S)
            end_now(1)
        self._speaks = False


@dataclass(slots=True, eq=False)
class Waiting:
    """See `Watchdog.waiting`."""

    watchdog: Watchdog
    what: str
    since: float
    limit_s: float
    _around: Waiting | None = None  # which goes on after this one

    def __enter__(self) -> None:
        dog = self.watchdog
        if dog.heard:
            raise LostRankError(dog.explain(self.what, late=False))
        self._around, dog._waits = dog._waits, self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        dog = self.watchdog
        dog._waits = self._around
        while dog._speaks:
            time.sleep(POLL_S / 5)
        if dog.size > 1 and isinstance(error, RuntimeError):  # what torch raises, by various names
            late = time.monotonic() - self.since >= 0.9 * dog.timeout_s
            if words := dog.explain(self.what, late=late):
                raise LostRankError(words) from error
