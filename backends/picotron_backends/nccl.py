"""`nccl`: the collectives of torch.distributed over NCCL. Declared without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from picotron_core.registry import Backend, Code, Kernel, Level, Reason, Request, hookimpl


def supports(request: Request) -> Sequence[Reason]:
    if request.device.type == "cuda":
        return ()
    detail = f"nccl moves tensors between CUDA devices, this is a {request.device.type} device"
    return (Reason(code=Code.DEVICE, detail=detail, fix="Use --backends comm=gloo-cpu"),)


def load() -> Kernel:
    from picotron_backends.torch_distributed import comm_over

    return comm_over("nccl")


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    yield Backend(
        op="comm",
        name="nccl",
        level=Level.ACCELERATED,
        load=load,
        supports=supports,
        summary="torch.distributed over NCCL, one GPU per process",
    )
