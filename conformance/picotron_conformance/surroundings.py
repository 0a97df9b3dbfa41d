"""What a kernel must leave as it found it: everything of the process that is not its result."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F

# Any: torch leaves these without types.
_deterministic: Any = torch.utils.deterministic
_attention: Any = torch.backends.cuda
_cuda: Any = torch.cuda

CHANGED = "a setting that is not put back, or a function of torch that is replaced"

# What a kernel is judged with, and could replace. torch wraps some of its functions itself when its
# compiler is first imported, so that comes before.
FUNCTIONS = [
    (owner, name)
    for owner in (torch, torch.Tensor, F, torch.linalg, torch.autograd, torch.testing)
    for name, value in vars(owner).items()
    if callable(value)
]


@dataclass(frozen=True, slots=True)
class Surrounding:
    """A thing that a call could change: `get` tells its state, `put` brings one back."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], object]


def snapshot() -> list[Any]:
    """The state of each of `SURROUNDINGS`."""
    return [surrounding.get() for surrounding in SURROUNDINGS]


def put_back(before: list[Any]) -> list[str]:
    """Bring all back to a snapshot; the names of what had changed."""
    changed = []
    for surrounding, state in zip(SURROUNDINGS, before, strict=True):
        if surrounding.get() != state:
            surrounding.put(state)
            changed.append(surrounding.name)
    return changed


def _set_deterministic(state: tuple[bool, bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])
    _deterministic.fill_uninitialized_memory = state[2]


def _get_deterministic() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _deterministic.fill_uninitialized_memory,
    )


def _get_numpy() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return kind, np.asarray(keys).tobytes(), *rest


def _set_numpy(state: tuple[Any, ...]) -> None:
    kind, keys, *rest = state
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _flushes() -> bool:
    """Whether denormals are taken for zero, as the processor is set."""
    return float(torch.tensor(2.0**-140) * 1) == 0


def _get_autocast() -> tuple[Any, ...]:
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in KINDS)


def _set_autocast(state: tuple[Any, ...]) -> None:
    for kind, (enabled, dtype) in zip(KINDS, state, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _set_environment(state: Mapping[str, str]) -> None:
    for name in _get_environment().keys() - state.keys():
        del os.environ[name]
    os.environ.update(state)


def _get_cuda() -> tuple[Any, ...]:
    """Nothing before CUDA is in use: to ask would start it."""
    if not (torch.cuda.is_available() and _cuda.is_initialized()):
        return ()
    stream = torch.cuda.current_stream()
    return _bytes(torch.cuda.get_rng_state()), torch.cuda.current_device(), stream


def _set_cuda(state: tuple[Any, ...]) -> None:
    if state:
        torch.cuda.set_device(state[1])
        torch.cuda.set_stream(state[2])
        torch.cuda.set_rng_state(_tensor(state[0]))


def _get_functions() -> list[Any]:
    return [getattr(owner, name, None) for owner, name in FUNCTIONS]


def _set_functions(state: list[Any]) -> None:
    for (owner, name), function in zip(FUNCTIONS, state, strict=True):
        if getattr(owner, name, None) is not function:
            setattr(owner, name, function)


def _get_environment() -> dict[str, str]:
    """Without what torch sets for itself when a part of it is first used."""
    return {n: v for n, v in os.environ.items() if not n.startswith(("TORCH", "TRITON"))}


def _flag(owner: Any, name: str) -> Surrounding:
    label = f"{owner.__name__ if hasattr(owner, '__name__') else type(owner).__name__}.{name}"
    return Surrounding(label, partial(getattr, owner, name), partial(setattr, owner, name))


KINDS = ("cpu", "cuda")
SURROUNDINGS = (
    Surrounding(
        "torch's random state",
        lambda: _bytes(torch.get_rng_state()),
        lambda state: torch.set_rng_state(_tensor(state)),
    ),
    Surrounding("Python's random state", random.getstate, random.setstate),
    Surrounding("numpy's random state", _get_numpy, _set_numpy),
    Surrounding("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Surrounding("grad mode", torch.is_grad_enabled, torch._C._set_grad_enabled),
    Surrounding("anomaly mode", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    Surrounding("the number of threads", torch.get_num_threads, torch.set_num_threads),
    Surrounding("deterministic algorithms", _get_deterministic, _set_deterministic),
    Surrounding(
        "float32 matmul precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    Surrounding("the flushing of denormals", _flushes, torch.set_flush_denormal),
    Surrounding("autocast", _get_autocast, _set_autocast),
    Surrounding("the environment", _get_environment, _set_environment),
    Surrounding("the working directory", os.getcwd, os.chdir),
    Surrounding(
        "the handler of SIGINT",
        lambda: signal.getsignal(signal.SIGINT),
        lambda state: signal.signal(signal.SIGINT, state),
    ),
    *(
        _flag(torch.backends.cudnn, name)
        for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
    ),
    _flag(torch.backends.cuda.matmul, "allow_tf32"),
    Surrounding(
        "flash attention's flag", _attention.flash_sdp_enabled, _attention.enable_flash_sdp
    ),
    Surrounding(
        "memory-efficient attention's flag",
        _attention.mem_efficient_sdp_enabled,
        _attention.enable_mem_efficient_sdp,
    ),
    Surrounding("math attention's flag", _attention.math_sdp_enabled, _attention.enable_math_sdp),
    Surrounding("CUDA's random state, device or stream", _get_cuda, _set_cuda),
    Surrounding("torch's own functions", _get_functions, _set_functions),
)


@contextmanager
def poisoned_memory(device: torch.device) -> Iterator[None]:
    """Memory that torch hands out uninitialised is NaN (integers: the largest) in the block.

    Kernels that ask CUDA's caching allocator directly get what a freed tensor of NaN left behind.
    """
    before = _get_deterministic()
    if device.type == "cuda":
        torch.full((1 << 24,), torch.nan, device=device)
    # Only in this mode does torch fill; warn_only, for it would refuse some right kernels.
    _set_deterministic((True, True, True))
    try:
        yield
    finally:
        _set_deterministic(before)
