"""`gloo-cpu`: the collectives of torch.distributed over gloo. Declared without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from picotron_core.registry import Backend, Code, Kernel, Level, Reason, Request, hookimpl


def supports(request: Request) -> Sequence[Reason]:
    if request.device.type == "cpu":
        return ()
    detail = f"gloo-cpu moves tensors in main memory, this is a {request.device.type} device"
    return (Reason(code=Code.DEVICE, detail=detail, fix="Use --backends comm=nccl"),)


def load() -> Kernel:
    from picotron_backends.torch_distributed import comm_over

    return comm_over("gloo")


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    yield Backend(
        op="comm",
        name="gloo-cpu",
        level=Level.PORTABLE,
        load=load,
        supports=supports,
        summary="torch.distributed over gloo, on any network",
    )
