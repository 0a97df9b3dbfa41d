"""Numbers of a trace: how long a rank computed and waited, and what was said along each axis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from picotron_core.cli.trace.recording import Happening, Recording

COMPUTES = ("forward", "backward")


def computing_ms(recording: Recording, span: Happening) -> float:
    """In forwards and backwards of a span, without what they wait for other ranks."""
    actions = recording.within(span, kind="phase", names=COMPUTES)
    waits = recording.within(span, kind="wait")
    waited = sum(w.ms for w in waits if any(w.lies_in(action) for action in actions))
    return sum(action.ms for action in actions) - waited


def waiting_ms(recording: Recording, span: Happening) -> float:
    return sum(wait.ms for wait in recording.within(span, kind="wait"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """The calls of one op along one axis in the traced steps, of all ranks.

    size: bytes of their tensors. sent: bytes that had to be sent. waited: by rank, in ms.
    """

    axis: str
    op: str
    calls: int
    size: int
    sent: int
    waited: tuple[float, ...]


def talks(recordings: Sequence[Recording]) -> list[Talk]:
    """By axis and op; the one that was waited for the longest is first."""
    calls: defaultdict[tuple[str, str], list[Happening]] = defaultdict(list)
    waited: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(recordings))
    for number, recording in enumerate(recordings):
        steps = {step.facts["step"] for step in recording.steps}
        for happening in recording.happenings:
            if happening.kind == "comm" and happening.facts.get("step") in steps:
                calls[happening.facts["axis"], happening.name].append(happening)
        for step in recording.steps:  # of a wait the time counts: what it ends may be older
            for wait in recording.within(step, kind="wait"):
                waited[wait.facts["axis"], wait.facts["op"]][number] += wait.ms
    found = [
        Talk(
            axis=axis,
            op=op,
            calls=len(calls[axis, op]),
            size=sum(call.facts["bytes"] for call in calls[axis, op]),
            sent=sum(call.facts["sent"] for call in calls[axis, op]),
            waited=tuple(waited[axis, op]),
        )
        for axis, op in {*calls, *waited}
    ]
    return sorted(found, key=lambda talk: -sum(talk.waited))
