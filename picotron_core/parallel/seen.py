"""Other ranks as their words in the store show them: where each was last, and whether it lives."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seen:
    """A rank as others see it. where: "in step 7, in all_reduce over dp"; "" if it never spoke."""

    where: str
    host: str
    pid: int
    silent: bool

    @classmethod
    def of(cls, text: bytes, *, silent: bool) -> Seen:
        _, where, host, pid = json.loads(text) if text else (0, "", "", 0)
        return cls(where, host, pid, silent)

    def wake(self) -> None:
        """If it is a stopped process of this machine: it shall find that its run is over, and give
        its memory back. To one that is dead, or only slow, this does nothing.
        """
        if self.pid and self.host == platform.node() and hasattr(signal, "SIGCONT"):
            with suppress(OSError):
                os.kill(self.pid, signal.SIGCONT)


def obituary(gone: dict[int, Seen]) -> str:
    """What is said of ranks that are gone."""
    met = " and ".join(f"rank {rank}, last {one.where}," for rank, one in gone.items() if one.where)
    never = " and ".join(f"rank {rank}" for rank, one in gone.items() if not one.where)
    sentences = []
    if met:
        sentences.append(
            f"{met} is not heard of any more: killed or stopped, or its machine is gone."
        )
    if never:
        sentences.append(f"{never} never spoke: it ended, or was stopped, before it had joined.")
    return " ".join(sentences)


def answer_of(ask: Callable[[], T], *, within_s: float) -> T | None:
    """What the store answers; None where it is gone, or silent as a stopped process is."""
    from torch.distributed import DistError

    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except DistError:
            pass
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(within_s)
    if errors:  # not the store's, so a fault of ours
        raise errors[0]
    return answers[0] if answers else None
