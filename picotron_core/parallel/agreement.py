"""All ranks run the same, or none runs: different numbers must not meet in a sum."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from picotron_core.errors import BackendError
from picotron_core.hardware import Device, device_of
from picotron_core.parallel.world import World
from picotron_core.registry import Selection


def devices_of_all(world: World, device: Device) -> list[Device]:
    """Every rank's device, in rank order."""
    told = world.gather("device", json.dumps(asdict(device)))
    return [device_of(json.loads(text)) for text in told]


def agree_on_plugins(world: World, enabled: Sequence[str]) -> None:
    """Every rank asks the others about each plugin: they must have the same.

    Raises: BackendError on every rank, naming the first that differs from rank 0.
    """
    told = world.gather("plugins", ", ".join(enabled))
    for rank, theirs in enumerate(told):
        if theirs != told[0]:
            raise BackendError(
                f"Ranks disagree on plugins: rank 0 enables {told[0] or 'none'}, rank {rank} "
                f"{theirs or 'none'}. Give all ranks the same PICOTRON_PLUGINS and settings."
            )


def evidence_of_all(world: World) -> Callable[[str, str], str]:
    """For `Quarantine`: what any rank has against a plugin or a kernel counts on every rank."""

    def of_all(what: str, mine: str) -> str:
        told = world.gather(f"evidence/{what}", mine)
        if mine or not any(told):
            return mine
        rank = next(rank for rank, evidence in enumerate(told) if evidence)
        return f"on rank {rank}: {told[rank]}"

    return of_all


def common(world: World, selections: Mapping[str, Selection]) -> dict[str, Selection]:
    """The selections with only those backends that every rank can use, in rank 0's order.

    Ranks may have different cards. Backends tried later drop out on all ranks alike.

    Raises: BackendError on every rank where ranks ask for different backends, or share none.
    """
    if world.size == 1:
        return dict(selections)
    mine = {op: [list(s.asked), _able(s)] for op, s in selections.items()}
    everyone = [json.loads(text) for text in world.gather("able", json.dumps(mine))]
    return {
        op: _shared(selection, [theirs[op] for theirs in everyone])
        for op, selection in selections.items()
    }


def _able(selection: Selection) -> list[str]:
    return [c.qualified_name for c in (selection.chosen, *selection.runners_up)]


def _shared(selection: Selection, of_ranks: Sequence[Any]) -> Selection:
    asked, order = of_ranks[0]
    for rank, (wish, able) in enumerate(of_ranks):
        if wish != asked or not set(order) & set(able):
            raise BackendError(
                f"Ranks disagree on {selection.op}: rank 0 has {', '.join(order)}, rank {rank} has "
                f"{', '.join(able)}. Give all ranks the same settings and software, and a backend "
                "that all their devices have."
            )
        order = [name for name in order if name in able]
    if not order:
        raise BackendError(
            f"Ranks disagree on {selection.op}: no backend serves on all of them. Name one that "
            f"all their devices have: --backends {selection.op}=naive-math."
        )
    candidates = {c.qualified_name: c for c in (selection.chosen, *selection.runners_up)}
    chosen, *others = (candidates[name] for name in order)
    return replace(selection, chosen=chosen, runners_up=tuple(others))


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
