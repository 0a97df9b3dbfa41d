"""`picotron trace`: the ranks' files as one timeline, as numbers and as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from picotron_core.cli.paths import located
from picotron_core.cli.terminal import open_console
from picotron_core.cli.trace.count import Talk, computing_ms, talks, waiting_ms
from picotron_core.cli.trace.recording import Recording, read_recordings
from picotron_core.cli.trace.ring import draw_ring
from picotron_core.cli.trace.schedule import draw_schedule, title_of
from picotron_core.engine import run_directory
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import one_line
from picotron_core.files import replace_text

PIPE_WIDTH = 160  # columns where no terminal says how many there are
BY_RANK = 8  # so many ranks have a column each


def show_trace(run: Path) -> int:
    """Print what was counted, and leave trace/all.json and the pictures behind."""
    run_directory.refuse_links(RunDirectory(run))
    run = located(run)[0]
    recordings = read_recordings(run)
    console = open_console(width=PIPE_WIDTH)
    folder = run / "trace"
    steps = [step.facts["step"] for step in recordings[0].steps]
    error_ms = max(r.about["clock_error_us"] for r in recordings) / 1000
    clocks = f", their clocks the same to {error_ms:.2f} ms" if len(recordings) > 1 else ""
    ranks = f"{len(recordings)} rank{'s' * (len(recordings) > 1)}"
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    console.print(f"{which} of {escape(str(run))}, {ranks}{clocks}\n")
    console.print(_ranks_table(recordings))
    if found := talks(recordings):
        console.print()
        console.print(_talks_table(found, recordings))
    _merge(recordings, folder)
    console.print(
        f"\nThe timeline:  {escape(str(folder / 'all.json'))}, for https://ui.perfetto.dev"
    )
    _draw(recordings, folder, console)
    return 0


def _ranks_table(recordings: Sequence[Recording]) -> Table:
    table = Table("rank", "place", box=None, header_style="bold")
    for name in ("step ms", "computes", "waits", "else"):
        table.add_column(name, justify="right")
    for recording in recordings:
        whole = sum(step.ms for step in recording.steps)
        computes = sum(computing_ms(recording, step) for step in recording.steps) / whole
        waits = sum(waiting_ms(recording, step) for step in recording.steps) / whole
        table.add_row(
            str(recording.rank),
            _place(recording),
            f"{whole / len(recording.steps):.1f}",
            f"{computes:.0%}",
            f"{waits:.0%}",
            f"{1 - computes - waits:.0%}",
        )
    return table


def _place(recording: Recording) -> str:
    degrees = recording.about["degrees"]
    return " ".join(f"{axis} {recording.place(axis)}" for axis, n in degrees.items() if n > 1)


def _talks_table(found: Sequence[Talk], recordings: Sequence[Recording]) -> Table:
    """Of one step, on average; what was waited as a share of each rank's step."""
    steps = len(recordings[0].steps)
    wholes = [sum(step.ms for step in recording.steps) for recording in recordings]
    table = Table("axis", "op", box=None, header_style="bold")
    for name in ("calls", "MB", "MB to send"):
        table.add_column(name, justify="right")
    few = len(recordings) <= BY_RANK
    for recording in recordings if few else ():
        table.add_column(f"rank {recording.rank} waits", justify="right")
    if not few:
        table.add_column("waits, of all ranks", justify="right")
    for talk in found:
        shares = [waited / whole for waited, whole in zip(talk.waited, wholes, strict=True)]
        texts = [f"{share:.1%}" for share in shares]
        table.add_row(
            talk.axis,
            talk.op,
            f"{talk.calls / steps:g}",
            f"{talk.size / steps / 1e6:.3f}",
            f"{talk.sent / steps / 1e6:.3f}",
            *(texts if few else [f"{min(shares):.1%} to {max(shares):.1%}"]),
        )
    return table


def _merge(recordings: Sequence[Recording], folder: Path) -> None:
    """All ranks in one file: their clocks agree already."""
    documents = [json.loads(r.path.read_text(encoding="utf-8")) for r in recordings]
    merged = {
        "traceEvents": [entry for document in documents for entry in document["traceEvents"]],
        "displayTimeUnit": "ms",
        "otherData": {"ranks": [document["otherData"] for document in documents]},
    }
    replace_text(folder / "all.json", json.dumps(merged, separators=(",", ":")))


def _draw(recordings: Sequence[Recording], folder: Path, console: Console) -> None:
    title = one_line(title_of(recordings, folder.parent))
    console.print(f"The last step: {escape(title)}")
    if find_spec("matplotlib") is None:
        console.print(escape("For its picture: pip install 'picotron[plot]'"))
        return
    draw_schedule(recordings, folder / "schedule.png", title=title)
    console.print(f"Its picture:   {escape(str(folder / 'schedule.png'))}")
    if recordings[0].degree("cp") > 1:
        draw_ring(recordings, folder / "ring.png", title="Ring attention, one layer")
        console.print(f"The ring:      {escape(str(folder / 'ring.png'))}")
