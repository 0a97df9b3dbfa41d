"""`mem_efficient`: attention, loss and swiglu that keep little for the backward."""

from __future__ import annotations

from collections.abc import Iterable

from picotron_backends.mem_efficient.pinned_rules import pinned_serves
from picotron_core.registry import Backend, Level, Request, hookimpl, kernel_from


def attention_level(request: Request) -> Level:
    """ACCELERATED where torch's CUDA kernel is the best there is, else PORTABLE."""
    pinned = pinned_serves(
        device_type=request.device.type,
        capability=request.device.capability,
        dtype=request.dtype,
        D=request.sizes.get("D", 1),
        same_length="cross_length" not in request.features,
        masked=bool(request.features & {"window", "doc_ids", "offset"}),
        lse=bool(request.features & {"lse", "lse_backward"}),
    )
    # From sm_80 on torch's flash kernel is the faster one in 16 bits, and as lean.
    flash = not request.device.below_ampere and request.dtype != "float32"
    return Level.ACCELERATED if pinned and not flash else Level.PORTABLE


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    yield Backend(
        op="attention",
        name="mem_efficient",
        level=attention_level,
        load=kernel_from("picotron_backends.mem_efficient.attention:attention"),
        supports=lambda request: (),
        deterministic=False,  # torch's CUDA kernel adds up dq in any order
        memory="linear",
        compiles=True,
        summary="O(S) memory: torch's kernel pinned on CUDA, else online softmax in blocks",
    )
    yield Backend(
        op="loss",
        name="mem_efficient",
        level=Level.PORTABLE,
        load=kernel_from("picotron_backends.mem_efficient.loss:loss"),
        supports=lambda request: (),
        memory="linear",
        compiles=True,
        summary="head and cross-entropy in chunks, never an (N, V) tensor",
    )
    yield Backend(
        op="swiglu",
        name="mem_efficient",
        level=Level.PORTABLE,
        load=kernel_from("picotron_backends.mem_efficient.swiglu:swiglu"),
        supports=lambda request: (),
        memory="linear",
        compiles=True,
        summary="keeps gate and up alone, makes silu(gate) again in the backward",
    )
