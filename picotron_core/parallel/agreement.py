"""All ranks run the same kernels, or none runs: different numerics must not meet in a sum."""

from __future__ import annotations

import json
from collections.abc import Sequence

from picotron_core.errors import BackendError
from picotron_core.parallel.world import World
from picotron_core.registry import Selection


def agree(world: World, selections: Sequence[Selection], dtype: str) -> None:
    """Compare selections and compute dtype through the store, before the first collective.

    Raises: BackendError on every rank, naming the first rank and op that differ from rank 0.
    """
    mine = {
        selection.op: f"{selection.chosen.qualified_name} {selection.chosen.provider.version}"
        for selection in selections
    }
    mine["dtype"] = dtype
    everyone = [json.loads(text) for text in world.gather("selection", json.dumps(mine))]
    for rank, theirs in enumerate(everyone):
        for op, backend in everyone[0].items():
            if theirs.get(op) != backend:
                raise BackendError(
                    f"Ranks disagree on {op}: rank 0 has {backend}, rank {rank} has "
                    f"{theirs.get(op)}. Give all ranks the same setting, e.g. with --backends."
                )
