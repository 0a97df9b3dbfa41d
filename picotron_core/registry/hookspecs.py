"""The hooks, all of them. pluggy project and entry-point group: `picotron`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pluggy

from picotron_core.hardware import Device
from picotron_core.registry.types import Backend, Selection

hookspec = pluggy.HookspecMarker("picotron")
hookimpl = pluggy.HookimplMarker("picotron")


@hookspec
def picotron_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Declare backends. Called once at start-up; import nothing heavy here.

    >>> from picotron_core.registry import Backend, Level, hookimpl, kernel_from
    >>> @hookimpl
    ... def picotron_backends():
    ...     yield Backend(
    ...         op="norm",
    ...         name="acme-norm",
    ...         level=Level.ACCELERATED,
    ...         load=kernel_from("acme_kernels.norm:rms_norm"),
    ...         supports=lambda request: (),
    ...     )
    >>> [backend.name for backend in picotron_backends()]
    ['acme-norm']
    """


@hookspec(firstresult=True)
def picotron_device() -> Device | None:
    """Describe the device, in place of Picotron's own look; None leaves it to the next.

    >>> from picotron_core.hardware import Device
    >>> from picotron_core.registry import hookimpl
    >>> @hookimpl
    ... def picotron_device():
    ...     return Device(type="cpu", name="a vendor's own", native_bfloat16=True)
    >>> picotron_device().name
    "a vendor's own"
    """


@hookspec
def picotron_on_selection(selection: Selection) -> None:
    """Told of each op's selection once its kernel is bound. It observes: an error in it is logged.

    >>> from picotron_core.registry import hookimpl
    >>> @hookimpl
    ... def picotron_on_selection(selection):
    ...     print(selection.op, "->", selection.chosen.qualified_name)
    """


@hookspec
def picotron_on_step(record: Mapping[str, Any]) -> None:
    """Told of each line of `metrics.jsonl`: loggers hang here. An error in it is logged.

    >>> from picotron_core.registry import hookimpl
    >>> @hookimpl
    ... def picotron_on_step(record):
    ...     print(record["step"], record["loss"])
    >>> picotron_on_step({"step": 1, "loss": 8.3})
    1 8.3
    """
