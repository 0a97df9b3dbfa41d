"""The collectives, asked of real processes: worlds of one to four ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from picotron_conformance.check import (
    Check,
    Profile,
    Record,
    Target,
    UndecidedError,
    Verdict,
    WrongKernelError,
)
from picotron_conformance.ranks import groups, misuse, timing, values, world
from picotron_conformance.ranks.rank import Question, Rank
from picotron_core.hardware import Device
from picotron_core.registry.types import Request

WORLDS = {"quick": (1, 2, 3), "full": (1, 2, 3, 4), "fuzz": (1, 2, 3, 4)}
PLENTY_S = 120.0  # the kernel's timeout: the suite ends ranks that hang before it does

FLOATS = ("float32", "bfloat16", "float16")
SUMMED = (*FLOATS, "float64", "int64", "int32", "uint8")
MOVED = (*SUMMED, "bool")


@dataclass(frozen=True, slots=True)
class Family:
    """One question. least: the smallest world where it can be asked.

    last: a world that has answered it is ended. in_full: only asked in the full profile.
    """

    name: str
    aspect: str
    ask: Callable[[Rank], None]
    dtypes: tuple[str, ...] = ("float32",)
    least: int = 1
    timeout_s: float = PLENTY_S
    last: bool = False
    in_full: bool = False


FAMILIES = (
    Family("all-reduce", "exact", values.reduces, SUMMED),
    Family("all-gather", "exact", values.gathers, MOVED),
    Family("reduce-scatter", "exact", values.scatters, SUMMED),
    Family("broadcast", "exact", values.broadcasts, MOVED),
    Family("point-to-point", "exact", values.passes_on, MOVED, least=2),
    Family("rounding", "forward", values.rounds, FLOATS),
    Family("message-order", "exact", values.messages_in_order, least=2),
    Family("late-ranks", "exact", timing.late_ranks, least=2),
    Family("early-waits", "exact", timing.early_waits, least=2),
    Family("together", "exact", timing.together),
    Family("barrier", "exact", timing.barriers),
    Family("subgroups", "exact", groups.subgroups),
    Family("group-dtypes", "exact", groups.group_dtypes, MOVED, least=3),
    Family("group-order", "exact", groups.group_order),
    Family("group-messages", "exact", groups.group_messages, least=3),
    Family("groups-apart", "exact", groups.groups_apart, least=3),
    Family("group-late", "exact", groups.group_late, least=3),
    Family("group-barriers", "exact", groups.group_barriers, least=2),
    Family("many-calls", "state", values.many_calls),
    Family("kept-results", "state", values.kept_results),
    Family("globals", "state", misuse.globals_unchanged),
    Family("restart", "state", misuse.restarts),
    Family("nan", "special", values.not_numbers, FLOATS),
    Family("leaves", "special", values.leaves),
    Family("strided", "special", misuse.strided),
    Family("wrong-sizes", "refusals", misuse.wrong_sizes),
    Family("no-such-peer", "refusals", misuse.no_such_peer),
    Family("outside-group", "refusals", misuse.outside_group, least=2),
    Family("no-such-op", "refusals", misuse.no_such_op),
    Family(
        "timeout",
        "special",
        misuse.timeouts,
        least=2,
        timeout_s=misuse.TIMEOUT_S,
        last=True,
        in_full=True,
    ),
)


def checks(device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    """By world, so that its ranks start once."""
    for size in WORLDS[profile]:
        for family in FAMILIES:
            if size < family.least or (family.in_full and profile == "quick"):
                continue
            for dtype in family.dtypes:
                ask = partial(asked, family=family, size=size, dtype=dtype)
                yield Check(
                    op="comm",
                    name=family.name,
                    case=f"world-{size}",
                    dtype=dtype,
                    aspect=family.aspect,
                    run=ask,
                    request=Request(op="comm", device=device, dtype=dtype, sizes={"world": size}),
                    refused=partial(refuses, ask=ask) if family is FAMILIES[0] else None,
                )


def asked(target: Target, record: Record, *, family: Family, size: int, dtype: str) -> None:
    if target.device.type == "cuda" and torch.cuda.device_count() < size:
        detail = f"a world of {size} needs {size} GPUs, here are {torch.cuda.device_count()}"
        raise UndecidedError(Verdict.NOT_RUN, detail)
    key = world.Key(target.candidate, size, target.device.type, family.timeout_s)
    question = Question(
        family.ask, getattr(torch, dtype), large=target.profile != "quick", seed=target.seed
    )
    world.ask(key, question, last=family.last)


def refuses(target: Target, record: Record, *, ask: Callable[[Target, Record], None]) -> None:
    """A world that is not claimed: no start, or the right numbers."""
    try:
        ask(target, record)
    except world.RankError as refusal:
        record.notes.append(f"raised: {refusal}")
    except WrongKernelError as wrong:
        raise WrongKernelError(
            f"it does not claim this, yet computes it, and wrongly: {wrong.detail}",
            hint="`start` must refuse what `supports` has reasons against",
        ) from None
