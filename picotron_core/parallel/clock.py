"""Stamps: points in time that cost a step next to nothing, and their meaning in nanoseconds."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

Stamp = Any  # whatever a clock's `now` returns


class Clock(Protocol):
    def start(self) -> None:
        """Before the first stamp."""

    def now(self) -> Stamp: ...

    def ns(self, stamp: Stamp) -> int:
        """The stamp by this machine's `time.monotonic_ns`."""


class HostClock:
    """For devices that are done when a call returns."""

    def start(self) -> None:
        return None

    def now(self) -> Stamp:
        return time.monotonic_ns()

    def ns(self, stamp: Stamp) -> int:
        return int(stamp)


class CudaClock:
    """When the device's current stream comes to a point, which may be long after the host did: a
    kernel lasts as long as the device takes for it, not as long as its launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        before = time.monotonic_ns()
        self._first = self.now()
        self._first.synchronize()
        self._first_ns = (before + time.monotonic_ns()) // 2

    def now(self) -> Stamp:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def ns(self, stamp: Stamp) -> int:
        """Waits for the device to get there."""
        stamp.synchronize()
        passed_ms: float = self._first.elapsed_time(stamp)
        return self._first_ns + round(passed_ms * 1e6)


def clock_of(device: torch.device) -> Clock:
    """The clock of a rank that computes on `device`."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
