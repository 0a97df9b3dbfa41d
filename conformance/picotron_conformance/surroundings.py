"""What a kernel must leave as it found it: everything of the process that is not its result."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# Any: torch leaves these without types.
_deterministic: Any = torch.utils.deterministic
_cuda: Any = torch.backends.cuda
_cuda_device: Any = torch.cuda

# Where a kernel could replace the functions that it is judged with.
PATCHABLE = (torch, torch.Tensor, F, torch.linalg, torch.autograd, torch.testing)


def snapshot() -> dict[str, Any]:
    """Everything by name. CUDA's part only once CUDA is in use."""
    state: dict[str, Any] = {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "Python's random state": random.getstate(),
        "numpy's random state": _numpy_state(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            _deterministic.fill_uninitialized_memory,
        ),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "flushing of denormals": float(torch.tensor(2.0**-140) * 1) == 0,
        "autocast": tuple(
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ),
        "the environment": dict(os.environ),
        "the working directory": os.getcwd(),
        "signal handlers": tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)),
        "cudnn's flags": (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        "attention's flags": (
            _cuda.flash_sdp_enabled(),
            _cuda.mem_efficient_sdp_enabled(),
            _cuda.math_sdp_enabled(),
        ),
        "torch's own functions": _functions(),
    }
    if torch.cuda.is_available() and _cuda_device.is_initialized():
        state |= {
            "CUDA's random state": torch.cuda.get_rng_state().numpy().tobytes(),
            "the current CUDA device": torch.cuda.current_device(),
            "the current CUDA stream": torch.cuda.current_stream().cuda_stream,
        }
    return state


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs, as words for a message."""
    changed = [name for name, value in before.items() if name in after and after[name] != value]
    if "torch's own functions" in changed:
        old, new = before["torch's own functions"], after["torch's own functions"]
        names = sorted(name for name in old if new.get(name) != old[name])
        changed[changed.index("torch's own functions")] = f"torch's own {', '.join(names[:5])}"
    return changed


@contextmanager
def poisoned_memory(device: torch.device) -> Iterator[None]:
    """Memory that torch hands out uninitialised is NaN (integers: the largest) in the block.

    Kernels that ask CUDA's caching allocator directly get what a freed tensor of NaN left behind.
    """
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _deterministic.fill_uninitialized_memory
    if device.type == "cuda":
        torch.full((1 << 24,), torch.nan, device=device)
    # Only in this mode does torch fill; warn_only, for it would refuse some right kernels.
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = fill


def _numpy_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return kind, np.asarray(keys).tobytes(), *rest


def _functions() -> dict[str, int]:
    return {
        f"{getattr(owner, '__name__', owner)}.{name}": id(value)
        for owner in PATCHABLE
        for name, value in vars(owner).items()
        if callable(value)
    }
