"""When torch's call lands on a flash kernel. No torch here: declarations ask it too."""

from __future__ import annotations


def flash_serves(
    *, device_type: str, capability: tuple[int, int] | None, dtype: str, D: int, masked: bool
) -> bool:
    """Whether torch has a flash kernel for a call; it knows groups of heads and needs O(S) memory.

    Args:
        dtype: torch's name, e.g. "float16".
        masked: the call carries an explicit mask, which no flash kernel on CUDA takes.

    Source: torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    if device_type == "cpu":
        return not masked
    if device_type != "cuda" or capability is None or capability < (8, 0):
        return False
    # The small shared memory of these cards cannot hold the backward of such heads.
    small = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    if small and 192 < D <= 224:
        return False
    return dtype in ("float16", "bfloat16") and D <= 256 and not masked


def expands_kv(
    *, device_type: str, capability: tuple[int, int] | None, dtype: str, D: int, masked: bool
) -> bool:
    """Whether K and V must be repeated to H heads before the call.

    Of torch's fused CUDA kernels only flash knows groups. With enable_gqa any other call lands on
    the one that makes the whole (T, S) matrix, and the user sees only that memory ran out.
    """
    return device_type == "cuda" and not flash_serves(
        device_type=device_type, capability=capability, dtype=dtype, D=D, masked=masked
    )
