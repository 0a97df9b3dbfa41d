"""When torch's memory-efficient CUDA kernel can serve. No torch here: declarations ask it too."""

from __future__ import annotations


def pinned_serves(
    *,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: str,
    D: int,
    same_length: bool,
    masked: bool,
    lse: bool,
) -> bool:
    """Whether the kernel takes a call: its dtypes, head dims and masks by compute capability.

    Args:
        dtype: torch's name, e.g. "float16".
        same_length: T == S; the kernel's causal mask is aligned top-left, the contract's is not.
        masked: a window or documents, which the kernel knows only as an O(T * S) bias.
        lse: torch's public call does not return it.

    Source: torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    if device_type != "cuda" or capability is None or capability < (5, 0):
        return False
    if masked or lse or not same_length:
        return False
    ampere = capability >= (8, 0)
    if dtype == "float32":
        return D % (4 if ampere else 1) == 0
    if dtype == "float16":
        return D % (8 if capability >= (7, 0) else 1) == 0
    return dtype == "bfloat16" and ampere and D % 8 == 0
