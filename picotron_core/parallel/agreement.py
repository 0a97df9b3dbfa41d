"""All ranks run the same, or none runs: different numbers must not meet in a sum."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from picotron_core.errors import BackendError
from picotron_core.hardware import Device
from picotron_core.parallel.world import World
from picotron_core.registry import Selection


def devices_of_all(world: World, device: Device) -> list[Device]:
    """Every rank's device, in rank order."""
    told = world.gather("device", json.dumps(asdict(device)))
    return [_device(json.loads(text)) for text in told]


def _device(record: dict[str, Any]) -> Device:
    """JSON knows no tuples."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Device(**fields)


def agree(world: World, selections: Sequence[Selection], facts: Mapping[str, str]) -> None:
    """Compare selections and facts through the store, before the first collective.

    Args:
        facts: what else must be the same everywhere, by name: dtype, data, settings.

    Raises: BackendError on every rank, naming the first rank and thing that differ from rank 0.
    """
    mine = {
        selection.op: f"{selection.chosen.qualified_name} {selection.chosen.provider.version}"
        for selection in selections
    }
    mine.update(facts)
    everyone = [json.loads(text) for text in world.gather("agreement", json.dumps(mine))]
    for rank, theirs in enumerate(everyone):
        for what, wanted in everyone[0].items():
            if theirs.get(what) != wanted:
                raise BackendError(
                    f"Ranks disagree on {what}: rank 0 has {wanted}, rank {rank} has "
                    f"{theirs.get(what)}. Give all ranks the same settings, software and data."
                )
