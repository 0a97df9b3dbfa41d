"""The picture of ring attention: whose keys each rank computes with, and what is on its way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from picotron_core.cli.trace import drawing
from picotron_core.cli.trace.recording import Happening, Recording
from picotron_core.cli.trace.schedule import last_step

DIRECTIONS = ("forward", "backward")
COLOURS = ("#6baed6", "#fd8d3c", "#74c476", "#9e9ac8", "#fdd0a2", "#c994c7", "#a1d99b", "#bcbddc")


def ring_of(recordings: Sequence[Recording]) -> list[Recording]:
    """The ranks of the first ring, in its order."""
    mine = [r for r in recordings if not any(r.place(axis) for axis in ("dp", "pp", "tp"))]
    return sorted(mine, key=lambda recording: recording.place("cp"))


def turns_of(recording: Recording, direction: str) -> list[Happening]:
    """The turns of the last ring of the last step in which one pass went through a layer."""
    turns = recording.within(last_step(recording), kind="phase", names=("ring",))
    mine = [turn for turn in turns if turn.facts["direction"] == direction]
    starts = [number for number, turn in enumerate(mine) if turn.facts["turn"] == 0]
    return mine[starts[-1] :] if starts else []


def calls_of(recording: Recording, turns: Sequence[Happening]) -> list[Happening]:
    """What was on its way along cp during these turns, and the waits for it, which lie in it."""
    mine = [h for h in recording.happenings if h.facts.get("axis") == "cp"]
    calls = [h for h in mine if h.kind == "comm"]
    calls = [c for c in calls if c.start < turns[-1].end and c.end > turns[0].start]
    waits = [h for h in mine if h.kind == "wait" and any(h.lies_in(call) for call in calls)]
    return calls + waits


def draw_ring(recordings: Sequence[Recording], path: Path, *, title: str) -> None:
    """Rows are the ranks of a ring; blocks are its turns, by whose keys they are with."""
    rows = ring_of(recordings)
    directions = [
        direction for direction in DIRECTIONS if all(turns_of(row, direction) for row in rows)
    ]
    picture = drawing.Picture(
        [f"rank {row.rank}" for row in rows], title=title, panels=len(directions)
    )
    for axes, direction in zip(picture.panels, directions, strict=True):
        axes.set_title(direction, loc="left", fontsize=9)
        zero = min(turns_of(row, direction)[0].start for row in rows)
        for number, row in enumerate(rows):
            turns = turns_of(row, direction)
            for turn in turns:
                source = int(turn.facts["block"])
                colour = COLOURS[source % len(COLOURS)]
                picture.block(axes, number, turn.start - zero, turn.end - zero, colour, str(source))
            for call in calls_of(row, turns):
                colour = drawing.WAIT if call.kind == "wait" else drawing.SENT
                picture.strip(axes, number, call.start - zero, call.end - zero, colour)
        axes.set_xlim(left=0)
    picture.legend(
        {
            "n: computes with the keys of rank n": COLOURS[0],
            "keys on their way": drawing.SENT,
            "waits for them": drawing.WAIT,
        }
    )
    picture.save(path)
