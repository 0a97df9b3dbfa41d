"""What the pictures share: rows with blocks, on a time axis."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from picotron_core.files import replace_bytes

GREY, GREEN = "#bdbdbd", "#74c476"
FORWARD, BACKWARD = ("#6baed6", "#9ecae1", "#c6dbef"), ("#fd8d3c", "#fdae6b", "#fdd0a2")  # by chunk
SENT, WAIT = "#636363", "#e34a33"
ROW, STRIP = 0.62, 0.16  # heights of a row's blocks and of the strip below it, of 1 from row to row


class Picture:
    """Rows from top to bottom; on each, blocks from a start to an end in ms.

    Raises: ImportError where matplotlib (extra `plot`) is not installed.
    """

    def __init__(self, rows: Sequence[str], *, title: str, panels: int = 1) -> None:
        from matplotlib.figure import Figure

        height = 1.3 + 0.62 * len(rows)
        self.figure = Figure(figsize=(11, height * panels), dpi=120, layout="constrained")
        self.panels: list[Any] = list(self.figure.subplots(panels, squeeze=False)[:, 0])
        self.figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for axes in self.panels:
            axes.set(ylim=(len(rows) - 0.35, -0.55), yticks=range(len(rows)), yticklabels=rows)
            axes.set_xlabel("ms", loc="right")
            axes.tick_params(axis="y", length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)

    def block(
        self, axes: Any, row: int, start: float, end: float, colour: str, text: str = ""
    ) -> None:
        """A block of a row, with a text where there is room."""
        axes.broken_barh(
            [(start, end - start)],
            (row - ROW / 2, ROW),
            facecolor=colour,
            edgecolor="white",
            linewidth=0.6,
        )
        if text:
            axes.text((start + end) / 2, row, text, ha="center", va="center", fontsize=8)

    def strip(self, axes: Any, row: int, start: float, end: float, colour: str) -> None:
        """A thin block below a row's."""
        axes.broken_barh([(start, end - start)], (row + ROW / 2, STRIP), facecolor=colour)

    def legend(self, colours: dict[str, str]) -> None:
        from matplotlib.patches import Patch

        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        self.figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )

    def save(self, path: Path) -> None:
        drawn = BytesIO()
        self.figure.savefig(drawn, format="png")
        replace_bytes(path, drawn.getvalue())
