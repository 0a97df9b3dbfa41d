"""The picture of a step: what each pipeline stage, or each replica, did when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from picotron_core.cli.trace import drawing
from picotron_core.cli.trace.count import COMPUTES, computing_ms
from picotron_core.cli.trace.recording import Happening, Recording

NAMES = {"1f1b": "1F1B", "afab": "AFAB", "interleaved": "Interleaved 1F1B"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubble:
    """The share of its time that a pipeline idled in a step, from the first forward to the last
    backward; and what it would idle if every forward and backward took as long as the others.
    """

    seen: float
    ideal: float


def rows_of(recordings: Sequence[Recording]) -> list[Recording]:
    """The stages of the first pipeline; without one, all ranks that have data of their own."""
    others = ("dp", "cp", "tp") if recordings[0].degree("pp") > 1 else ("tp",)
    return [r for r in recordings if not any(r.place(axis) for axis in others)]


def last_step(recording: Recording) -> Happening:
    return recording.steps[-1]


def actions_of(recording: Recording) -> list[Happening]:
    """The forwards and backwards of the last step."""
    return recording.within(last_step(recording), kind="phase", names=COMPUTES)


def bubble(stages: Sequence[Recording]) -> Bubble:
    actions = [action for stage in stages for action in actions_of(stage)]
    whole = max(a.end for a in actions) - min(a.start for a in actions)
    busy = sum(computing_ms(stage, last_step(stage)) for stage in stages)
    micro_batches, chunks = (
        1 + max(action.facts[what] for action in actions) for what in ("micro_batch", "chunk")
    )
    p, turns = len(stages), micro_batches * chunks
    return Bubble(seen=1 - busy / (p * whole), ideal=(p - 1) / (turns + p - 1))


def draw_schedule(recordings: Sequence[Recording], path: Path, *, title: str) -> None:
    """Rows are stages, or replicas; blocks are forwards and backwards by their micro-batch."""
    rows = rows_of(recordings)
    start = min(last_step(row).start for row in rows)
    staged = recordings[0].degree("pp") > 1
    picture = drawing.Picture([_label(row) for row in rows], title=title)
    (axes,) = picture.panels
    for number, row in enumerate(rows):
        step = last_step(row)
        for action in actions_of(row):
            shades = drawing.FORWARD if action.name == "forward" else drawing.BACKWARD
            colour = shades[action.facts.get("chunk", 0) % len(shades)]
            text = str(action.facts["micro_batch"])
            picture.block(axes, number, action.start - start, action.end - start, colour, text)
        for phase in row.within(step, kind="phase", names=("gradients", "optimizer")):
            colour = drawing.GREY if phase.name == "gradients" else drawing.GREEN
            picture.block(axes, number, phase.start - start, phase.end - start, colour)
        # A pipeline's messages are many, and short: its picture is of the waits alone.
        for call in [] if staged else row.within(step, kind="comm"):
            picture.strip(axes, number, call.start - start, call.end - start, drawing.SENT)
        for wait in row.within(step, kind="wait"):
            picture.strip(axes, number, wait.start - start, wait.end - start, drawing.WAIT)
    axes.set_xlim(0, max(last_step(row).end for row in rows) - start)
    picture.legend(
        {
            "forward of micro-batch n": drawing.FORWARD[0],
            "its backward": drawing.BACKWARD[0],
            "sum of gradients": drawing.GREY,
            "optimizer": drawing.GREEN,
            **({} if staged else {"on its way": drawing.SENT}),
            "waits for another rank": drawing.WAIT,
        }
    )
    picture.save(path)


def _label(row: Recording) -> str:
    """Its name; of a stage also how many micro-batches' activations it had at once."""
    if row.degree("pp") == 1:
        return f"rank {row.rank}"
    actions = actions_of(row)
    kept = max(accumulate(1 if action.name == "forward" else -1 for action in actions))
    chunks = 1 + max(action.facts["chunk"] for action in actions)
    return f"stage {row.place('pp')}\nkeeps {kept / chunks:g}"


def title_of(recordings: Sequence[Recording], run: Path) -> str:
    """What the picture shows, and how idle it was."""
    first = recordings[0]
    step = last_step(first).facts["step"]
    if first.degree("pp") == 1:
        return f"step {step} of {run.name}"
    stages = rows_of(recordings)
    share = bubble(stages)
    settings = first.about["parallel"]
    micro_batches = 1 + max(action.facts["micro_batch"] for action in actions_of(first))
    return (
        f"{NAMES[settings['schedule']]}, {len(stages)} stages, {micro_batches} micro-batches: "
        f"idle {share.seen:.0%}, by the formula {share.ideal:.0%}"
    )
