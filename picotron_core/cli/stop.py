"""Requests to stop: Ctrl-C, a signal of a scheduler or a closing terminal, and the time limit.

A signal means one of two things. Where there is a step to finish (`Stop.training`) it is noted, and
the training loop ends with a save. Everywhere else, in imports, preparation and commands that do
not train, it is raised in the main thread as `Stopped`, so that `finally` clauses clean up.
"""

from __future__ import annotations

import _thread
import atexit
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from picotron_core.cli.output import hurry

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
# BSD's EX_TEMPFAIL: what a scheduler may start again, e.g. by Slurm's `scontrol requeue`.
REQUEUE = 75
# SIGTERM is a scheduler's, SIGHUP a closing terminal's, SIGXCPU that of a limit on CPU time. Some
# schedulers can be asked for SIGUSR1 or SIGUSR2 (`sbatch --signal=USR1@120`, `qsub -notify`).
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# In which a second SIGINT is the same Ctrl-C: a scheduler may send it to all processes at once, and
# a launcher passes on its own.
SAME_S = 1.0
AGAIN_S = 0.05  # until a signal is raised once more that was raised where Python ignores errors

Handler = Callable[[int, FrameType | None], Any]
_held_back: list[list[int]] = []  # the signals that each `uninterrupted` block has put off


class Stopped(BaseException):
    """A signal asked this process to stop, where no step has to be finished first.

    exit_code: 130 for Ctrl-C, else 75.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}")
        self.number = number
        self.exit_code = INTERRUPTED if number == signal.SIGINT else REQUEUE


@dataclass(slots=True, kw_only=True)
class Stop:
    """What this rank was asked. interrupted: by Ctrl-C. ended: by another signal.
    training: there is a step to finish and to save; elsewhere a signal is raised.

    limit_s: seconds from `began` by which the last save must be done; 0: no limit.
    """

    limit_s: float = 0.0
    began: float = field(default_factory=time.monotonic)
    interrupted: bool = False
    ended: bool = False
    training: bool = False

    @property
    def asked(self) -> bool:
        """Whether a signal has asked this rank to stop."""
        return self.interrupted or self.ended

    def is_late(self, *, step_s: float, save_s: float) -> bool:
        """Whether there is no time for another step and a save, each taking twice as long."""
        return self.left_s < 2 * (step_s + save_s)

    @property
    def left_s(self) -> float:
        """Seconds to the limit; infinitely many where there is none."""
        if not self.limit_s:
            return math.inf
        return self.limit_s - (time.monotonic() - self.began)


@contextmanager
def listening(stop: Stop, *, say: Callable[[str], None], ranks: int = 1) -> Iterator[None]:
    """Note signals in `stop` while it is training, and raise them else. A second Ctrl-C, `SAME_S`
    after the first or later, is raised in any case.

    Args:
        say: shows a line to the user, at once.
        ranks: of several, a rank that fails has to tell the others why, and a launcher that has
            seen another die sends SIGTERM meanwhile.

    Raises: Stopped.
    """

    interrupted_at = math.inf

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal interrupted_at
        before = stop.interrupted if number == signal.SIGINT else stop.ended
        now = time.monotonic()
        is_second = number == signal.SIGINT and now > interrupted_at + SAME_S
        if number == signal.SIGINT:
            stop.interrupted = True
            interrupted_at = min(interrupted_at, now)
        else:
            stop.ended = True
        if not stop.training or is_second:
            raise_stopped(number)
        elif not before:
            hurry()
            name = "" if number == signal.SIGINT else f" for {signal.Signals(number).name}"
            again = "; Ctrl-C again quits without saving" if number == signal.SIGINT else ""
            say(f"\nStopping{name} after this step{again}.")

    with _handled_by(on_signal) as former:
        try:
            yield
        except BaseException:
            if ranks > 1:
                former[signal.SIGTERM] = signal.SIG_IGN
            raise


@contextmanager
def raising_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread when a signal asks to stop, while this lasts. Called from
    another thread, which gets no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = sys.unraisablehook

    def on_unraisable(ignored: sys.UnraisableHookArgs) -> None:
        """A signal may come while Python runs a callback, such as `__del__`, whose exceptions it
        prints and forgets.
        """
        if isinstance(ignored.exc_value, Stopped):
            again = threading.Timer(AGAIN_S, _thread.interrupt_main, [ignored.exc_value.number])
            again.daemon = True
            again.start()
        else:
            former(ignored)

    sys.unraisablehook = on_unraisable
    try:
        with _handled_by(lambda number, _: raise_stopped(number)):
            yield
    finally:
        sys.unraisablehook = former
        # While the interpreter shuts down nobody catches an exception.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off a signal that would be raised within this block to its end: for what must be noted
    as soon as it is done, such as a folder that was made. It must not take long.
    """
    numbers: list[int] = []
    _held_back.append(numbers)
    try:
        yield
    finally:
        _held_back.remove(numbers)
    if numbers:
        raise_stopped(numbers[0])


def raise_stopped(number: int) -> None:
    """Raises: Stopped, unless within `uninterrupted`, which does so at its end."""
    hurry()  # what is still to be said must not wait for a reader that does not read
    if _held_back:
        _held_back[-1].append(number)
    else:
        raise Stopped(number)


@contextmanager
def _handled_by(handler: Handler) -> Iterator[dict[int, Any]]:
    """Have a handler for the signals that ask to stop. Yields those that the end restores."""
    former: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            if not stays_ignored(number):
                former[number] = signal.getsignal(number)
                signal.signal(number, handler)
        yield former
    finally:
        for number, before in former.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)


def stays_ignored(number: int) -> bool:
    """Whether a signal was ignored when this process started, and is meant to stay so.

    `nohup` ignores SIGHUP for the command that it starts. A shell without job control ignores
    SIGINT and SIGQUIT for what it starts in the background, for the Ctrl-C that ends the script
    would reach it as well; without a terminal there is no Ctrl-C, and SIGINT was sent to this very
    process. Other signals are heard even so: a script ignores them for itself while its ranks are
    to save.
    """
    if signal.getsignal(number) is not signal.SIG_IGN:
        return False
    if number == getattr(signal, "SIGHUP", None):
        return True
    return number in (signal.SIGINT, getattr(signal, "SIGQUIT", None)) and _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | getattr(os, "O_NOCTTY", 0)))
    except OSError:
        return False
    return True
