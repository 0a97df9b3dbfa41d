"""Being asked to stop: by Ctrl-C, by a scheduler's signal, or by the clock."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

# BSD's EX_TEMPFAIL: what a scheduler may start again, e.g. by Slurm's `scontrol requeue`.
REQUEUE = 75
# Schedulers send SIGTERM before SIGKILL, and SIGUSR1 where asked to (`sbatch --signal=USR1@120`).
SIGNALS = [signal.SIGINT, signal.SIGTERM, *filter(None, [getattr(signal, "SIGUSR1", None)])]


@dataclass(slots=True, kw_only=True)
class Stop:
    """What this rank was asked. interrupted: by Ctrl-C. ended: by a scheduler.
    prepared: whether there is a step to finish: until then Ctrl-C quits at once.

    limit_s: seconds from `began` by which the last save must be done; 0: no limit.
    """

    limit_s: float = 0.0
    began: float = field(default_factory=time.monotonic)
    interrupted: bool = False
    ended: bool = False
    prepared: bool = False

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
def listening(stop: Stop, *, quiet: bool, ranks: int = 1) -> Iterator[None]:
    """Note signals in `stop` while this lasts. Ctrl-C pressed twice quits at once.

    Args:
        quiet: say nothing: another rank does.
        ranks: of several, one that leaves by an error has a word to say first: a launcher that has
            seen another die sends them SIGTERM.
    """

    def on_signal(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if stop.interrupted or not stop.prepared:
                raise KeyboardInterrupt
            stop.interrupted = True
        else:
            stop.ended = True
        if not quiet:
            name = "" if number == signal.SIGINT else f" for {signal.Signals(number).name}"
            again = "; Ctrl-C again quits without saving" if number == signal.SIGINT else ""
            when = "after this step" if stop.prepared else "before the first step"
            print(f"\nStopping{name} {when}{again}.", flush=True)

    former = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    except BaseException:
        if ranks > 1:
            former[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
