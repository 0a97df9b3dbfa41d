"""A whole plugin: it declares one backend for `norm`. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from picotron_core.registry import Backend, Code, Level, Reason, Request, hookimpl, kernel_from


def supports(request: Request) -> Sequence[Reason]:
    """CPU only: an honest claim is part of a backend, and the conformance suite holds it to it."""
    if request.device.type == "cpu":
        return ()
    detail = f"one-pass was only tried on CPUs, this is a {request.device.type} device"
    return (Reason(code=Code.DEVICE, detail=detail, fix="Use --backends norm=auto there"),)


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    yield Backend(
        op="norm",
        name="one-pass",
        level=Level.ACCELERATED,
        load=kernel_from("picotron_example.norm:rms_norm"),
        supports=supports,
        memory="linear",
        compiles=True,
        summary="example: one autograd node, its backward in closed form",
    )
