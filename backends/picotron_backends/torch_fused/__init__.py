"""`torch-fused`: norm and optimizer by torch's fused kernels. Declared without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from picotron_core.registry import Backend, Code, Level, Reason, Request, hookimpl, kernel_from


def norm_level(request: Request) -> Level:
    """ACCELERATED on CUDA. On a CPU torch composes it of the same steps, and gains no time."""
    return Level.ACCELERATED if request.device.type == "cuda" else Level.REFERENCE


def optimizer_supports(request: Request) -> Sequence[Reason]:
    if request.device.type in ("cpu", "cuda"):
        return ()
    detail = f"torch's fused AdamW is used on cpu and cuda, this is a {request.device.type} device"
    return (Reason(code=Code.DEVICE, detail=detail, fix="Use --backends optimizer=naive-math"),)


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    yield Backend(
        op="norm",
        name="torch-fused",
        level=norm_level,
        load=kernel_from("picotron_backends.torch_fused.norm:rms_norm"),
        supports=lambda request: (),
        compiles=True,
        summary="torch's rms_norm",
    )
    yield Backend(
        op="optimizer",
        name="torch-fused",
        level=Level.ACCELERATED,
        load=kernel_from("picotron_backends.torch_fused.optimizer:adamw"),
        supports=optimizer_supports,
        launches=("aten::_fused_adamw_",),
        summary="torch's AdamW in one pass over all parameters",
    )
