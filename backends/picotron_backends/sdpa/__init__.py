"""`sdpa`: attention by torch's own choice of kernel. Declared without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from picotron_backends.sdpa.flash_rules import flash_serves
from picotron_core.registry import Backend, Code, Level, Reason, Request, hookimpl, kernel_from


def supports(request: Request) -> Sequence[Reason]:
    if not request.features & {"lse", "lse_backward"}:
        return ()
    detail = "torch's scaled_dot_product_attention does not return the log-sum-exp"
    return (Reason(code=Code.FEATURE, detail=detail, fix="Use --backends attention=mem_efficient"),)


def level(request: Request) -> Level:
    """ACCELERATED where torch has a flash kernel for the request."""
    # A causal mask of unequal lengths must be given as a tensor, except for a single query.
    unaligned = "offset" in request.features or (
        "cross_length" in request.features and request.sizes.get("T") != 1
    )
    flash = flash_serves(
        device_type=request.device.type,
        capability=request.device.capability,
        dtype=request.dtype,
        D=request.sizes.get("D", 1),
        masked=unaligned or bool(request.features & {"window", "doc_ids"}),
    )
    return Level.ACCELERATED if flash else Level.PORTABLE


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    yield Backend(
        op="attention",
        name="sdpa",
        level=level,
        load=kernel_from("picotron_backends.sdpa.attention:attention"),
        supports=supports,
        compiles=True,
        deterministic=False,  # the flash kernel adds up dq in any order on CUDA
        summary="torch's scaled_dot_product_attention: flash on a CPU and from sm_80 on",
    )
