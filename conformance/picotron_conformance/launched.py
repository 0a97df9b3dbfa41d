"""What really ran in a call: torch's profiler for kernels and memory, Python's for functions."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


def names_launched(call: Callable[[], object], device: torch.device) -> set[str]:
    """The names of all operators and device kernels of a call."""
    with _profiled(device) as profiler:
        call()
    return {str(event.name()) for event in _events(profiler)}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call held at once, beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # or what others held would be given back meanwhile
    with _profiled(device, memory=True) as profiler:
        call()
    held = peak = 0
    changes = [event for event in _events(profiler) if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def folders_entered(folders: Collection[str], seen: set[str]) -> Iterator[None]:
    """Collect in `seen` those of `folders` that a Python function called in the block stands in."""
    before = sys.getprofile()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and os.path.dirname(frame.f_code.co_filename) in folders:
            seen.add(os.path.dirname(frame.f_code.co_filename))

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


@contextmanager
def _profiled(device: torch.device, *, memory: bool = False) -> Iterator[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profiler:
        yield profiler
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _events(profiler: Any) -> Any:
    return profiler.profiler.kineto_results.events()
