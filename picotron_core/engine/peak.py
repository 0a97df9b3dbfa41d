"""The most memory that a stretch of a run takes, where the system lets a peak be reset."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
M_MMAP_THRESHOLD = -3  # malloc.h of glibc
EXACT, USUAL = 2**16, 2**25  # bytes; USUAL is where glibc's own adaptation ends


def reset_peak(device: torch.device) -> int | None:
    """Forget the peak so far. Returns: the bytes held now; None where a peak cannot be reset.

    Of CUDA's allocator, or of the whole process (Linux).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        (PROCESS / "clear_refs").write_text("5")  # proc(5): the peak resident set becomes today's
    except OSError:
        return None
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes held since `reset_peak`, which must have been able to."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def hold_no_freed_memory(yes: bool) -> None:
    """Whether what tensors free goes back to the system at once: then the process holds what they
    do, to the per cent, where elsewhere gaps and reserves come to a fifth. It costs page faults.

    glibc only; elsewhere without effect.
    """
    if sys.platform == "win32":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, EXACT if yes else USUAL)
        if yes:
            libc.malloc_trim(0)  # what it holds from before


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found
    return int(found[1]) * 1024
