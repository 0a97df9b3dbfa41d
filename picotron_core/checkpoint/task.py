"""What a save does in the background, and how it ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from picotron_core.errors import NotFiniteError, RunError


class Task(threading.Thread):
    """Work in the background, and its end. A daemon: who quits at once does not wait for a disk."""

    def __init__(self, work: Callable[[], str]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.answer, self.seconds = "", 0.0
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        begin = time.monotonic()
        try:
            self.answer = self._work()
        except Exception as error:  # noqa: BLE001 - `outcome` raises it in the main thread
            self.error = error
        self.seconds = time.monotonic() - begin

    def outcome(self) -> Outcome:
        """Once done. Raises what is no failure of a disk."""
        self.join()
        if self.error and not isinstance(self.error, OSError | NotFiniteError | RunError):
            raise self.error
        why = str(self.error) if self.error else ""
        return Outcome(answer=self.answer, why=why, seconds=self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one rank tells the others of its task. why: it failed, "" where it did not.
    seconds: that it took, none of them waiting for the others.
    """

    answer: str
    why: str
    seconds: float
