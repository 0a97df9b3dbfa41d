"""The console that commands print to: as wide as the terminal, or as wide as a pipe wants it."""

from __future__ import annotations

from rich.console import Console


def open_console(*, width: int, quiet: bool = False) -> Console:
    """A console; `width` columns where no terminal says how many there are."""
    console = Console(quiet=quiet, highlight=False)
    if console.is_terminal:
        return console
    return Console(quiet=quiet, highlight=False, width=width, soft_wrap=True)
