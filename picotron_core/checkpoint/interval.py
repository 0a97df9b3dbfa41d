"""When to save: every so many steps, or as often as it costs little."""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median
from typing import Literal

from picotron_core.checkpoint.save import Saver

SHARE = 0.035  # of the time of a run: CheckFreq's bound (Mohan et al. 2021, FAST, section 4.3)
FIRST = 10  # steps before the first save, which tell how long a step takes when nothing is written
LEAST_S = 60.0  # a tiny state costs nothing, but a disk need not be busy all the time


class Interval:
    """Says after each step whether a save is due.

    With "auto" the cost of a save is measured: what it kept training from, and by how much steps
    were slower while it was written. Saves then begin so far apart that this is at most SHARE of
    the time, and one ends before the next begins.
    """

    def __init__(
        self, every: int | Literal["auto"], saver: Saver, *, least_s: float = LEAST_S
    ) -> None:
        self.every, self.saver, self.least_s = every, saver, least_s
        self.seconds = 0.0  # auto: between two saves; 0 until one is measured
        self._usual: deque[float] = deque(maxlen=50)  # seconds of steps while nothing was written
        self._began = time.monotonic()
        self._cost, self._writing, self._held = 0.0, False, 0.0

    def due(self, step: int, step_s: float) -> bool:
        """Args: step_s: what the step took. With "auto" the answer is this rank's alone: the first
        one's counts.
        """
        self._measure(step_s)
        if self.every != "auto":
            return self.every > 0 and step % self.every == 0
        if self.saver.under_way:
            return False
        if not self.seconds:
            return len(self._usual) >= FIRST
        return time.monotonic() - self._began >= self.seconds

    def began(self) -> None:
        """A save was begun."""
        self._began = time.monotonic()
        self._cost, self._writing = 0.0, True

    def at_risk(self) -> str:
        """What is lost at most if the run dies just before the next save is there."""
        if not self._usual:
            return "all steps until the next save"
        step_s = median(self._usual)
        if self.every == "auto":
            steps = max(1, math.ceil(max(self.seconds, self.least_s) / step_s))
        else:
            steps = self.every
        return f"{steps} steps (about {steps * step_s:.0f} s)" if steps else "all steps to the end"

    def _measure(self, step_s: float) -> None:
        held, self._held = self.saver.held_s - self._held, self.saver.held_s
        if not self._writing:
            self._usual.append(step_s)
            return
        usual = median(self._usual) if self._usual else step_s
        self._cost += held + max(0.0, step_s - usual)
        if not self.saver.under_way:
            self._writing = False
            self.seconds = max(self._cost / SHARE, self.saver.write_s, self.least_s)
