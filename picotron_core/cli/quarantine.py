"""`picotron quarantine`: what the trials of plugins found, and having them tried again."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from picotron_core.cli.selection import open_quarantine
from picotron_core.cli.terminal import open_console
from picotron_core.config import Settings
from picotron_core.errors import ConfigError, did_you_mean
from picotron_core.files import remove_file
from picotron_core.registry import normalise
from picotron_core.registry.quarantine import Entry

PIPE_WIDTH = 160  # columns where no terminal says how many there are


def run_quarantine(settings: Settings, action: str, plugin: str) -> int:
    """List the verdicts, or forget those of a plugin (all, if none is named)."""
    quarantine = open_quarantine(settings)
    kept = list(quarantine.entries())
    known = {normalise(entry.plugin) for _, entry in kept}
    if plugin and normalise(plugin) not in known:
        hint = did_you_mean(normalise(plugin), known) if known else "No plugin was tried here."
        raise ConfigError(
            f"No trial of a plugin {plugin!r} is kept in {quarantine.folder}. {hint} If the run "
            "has another data.cache_dir, give it with --data.cache_dir."
        )
    mine = [(p, e) for p, e in kept if not plugin or normalise(e.plugin) == normalise(plugin)]
    if action == "list":
        _show([entry for _, entry in mine])
        return 0
    for path, _ in mine:
        remove_file(path)
    print(f"Forgot {len(mine)} verdict{'s' * (len(mine) != 1)}: the next run tries again.")
    return 0


def _show(entries: list[Entry]) -> None:
    console = open_console(width=PIPE_WIDTH)
    if not entries:
        console.print("No plugin was tried here yet.")
        return
    table = Table("what", "of", "tried", "verdict", box=None, header_style="bold")
    for entry in sorted(entries, key=lambda entry: (not entry.evidence, entry.what, entry.when)):
        verdict = f"[red]quarantined[/]: {escape(entry.evidence)}" if entry.evidence else "passed"
        origin = f"{entry.distribution} {entry.version}"
        table.add_row(escape(entry.what), escape(origin), entry.when, verdict)
    console.print(table)
