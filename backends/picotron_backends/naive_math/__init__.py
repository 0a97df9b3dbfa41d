"""`naive-math`: every op as its equations are written. The reference; declared without torch."""

from __future__ import annotations

from collections.abc import Iterable

from picotron_core.registry import Backend, Level, hookimpl, kernel_from

KERNELS = {
    "attention": "attention:attention",
    "norm": "norm:rms_norm",
    "rope": "rope:rope",
    "swiglu": "swiglu:swiglu",
    "loss": "loss:loss",
    "optimizer": "optimizer:adamw",
}


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    for op, kernel in KERNELS.items():
        yield Backend(
            op=op,
            name="naive-math",
            level=Level.REFERENCE,
            load=kernel_from(f"picotron_backends.naive_math.{kernel}"),
            supports=lambda request: (),
            compiles=True,
            summary="the equations of the contract in plain torch",
        )
