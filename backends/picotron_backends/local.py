"""`local`: the collectives of a single process. Declared without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from picotron_core.registry import Backend, Code, Level, Reason, Request, hookimpl, kernel_from


def supports(request: Request) -> Sequence[Reason]:
    world = request.sizes.get("world", 1)
    if world == 1:
        return ()
    detail = f"local is for one process, this run has {world}"
    return (Reason(code=Code.WORLD_SIZE, detail=detail, fix="Use --backends comm=auto"),)


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    yield Backend(
        op="comm",
        name="local",
        level=Level.SPECIALIZED,
        load=kernel_from("picotron_backends.one_process:COMM"),
        supports=supports,
        summary="one process: every collective is a copy or nothing",
    )
