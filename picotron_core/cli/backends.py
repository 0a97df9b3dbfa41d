"""`picotron backends`: who would serve each op on a device, and why others cannot."""

from __future__ import annotations

import json
from typing import Any

from rich.markup import escape
from rich.table import Table

from picotron_core.cli.model import architecture_of
from picotron_core.cli.selection import (
    find_device,
    open_quarantine,
    open_registry,
    select,
    training_requests,
)
from picotron_core.cli.terminal import open_console
from picotron_core.config import Settings
from picotron_core.errors import BackendError
from picotron_core.hardware import Device
from picotron_core.ops import OPS
from picotron_core.precision import choose_precision
from picotron_core.registry import Request, Verdict
from picotron_core.registry.plugins import PluginRecord, Registry
from picotron_core.registry.select import installed_version, judge, rank

PIPE_WIDTH = 160  # columns where no terminal says how many there are


def list_backends(settings: Settings, *, as_json: bool) -> int:
    """Print the table; exit code 2 where the settings ask for what this device cannot do."""
    registry = open_registry(settings, open_quarantine(settings))
    device = find_device(settings, registry)
    precision = choose_precision(settings.config.train.dtype, [device])
    architecture = architecture_of(settings.config, settings.config.data.vocab_size)
    wanted = training_requests(settings, architecture, device, precision.compute, world_size=1)
    rows = [row for op in OPS for row in _rows(op, settings, registry, wanted)]
    errors = list(dict.fromkeys(row["error"] for row in rows if "error" in row))
    answer = {
        "device": str(device),
        "dtype": precision.compute,
        "backends": [row for row in rows if "error" not in row],
        "plugins": [_plugin_row(record) for record in registry.plugins],
        "errors": errors,
    }
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        _print(answer, device, precision.reason)
    return BackendError.exit_code if errors else 0


def _rows(
    op: str, settings: Settings, registry: Registry, wanted: list[Request]
) -> list[dict[str, Any]]:
    """One op's backends in the order of `auto`, and the error if the wish cannot be met."""
    asked = [request for request in wanted if request.op == op]
    verdicts = sorted(
        (
            judge(candidate, asked, installed_version)
            for candidate in registry.candidates
            if candidate.backend.op == op
        ),
        key=rank,
    )
    try:
        selection = select(settings, registry, asked).get(op)
    except BackendError as error:
        return [*(_row(verdict, "able") for verdict in verdicts), {"error": str(error)}]
    chosen = selection.chosen if selection else None
    return [_row(v, "selected" if v.candidate is chosen else "able") for v in verdicts]


def _row(verdict: Verdict, status: str) -> dict[str, Any]:
    candidate = verdict.candidate
    return {
        "op": candidate.backend.op,
        "backend": candidate.backend.name,
        "qualified_name": candidate.qualified_name,
        "level": verdict.level.name.lower(),
        "provider": f"{candidate.provider.distribution} {candidate.provider.version}",
        "status": "refused" if verdict.reasons else status,
        "summary": candidate.backend.summary,
        "reasons": [
            {"code": reason.code, "detail": reason.detail, "fix": reason.fix}
            for reason in verdict.reasons
        ],
    }


def _plugin_row(record: PluginRecord) -> dict[str, str]:
    return {
        "plugin": record.provider.plugin,
        "provider": f"{record.provider.distribution} {record.provider.version}",
        "status": record.status,
        "error": record.error,
        "traceback": record.traceback,
    }


def _print(answer: dict[str, Any], device: Device, reason: str) -> None:
    console = open_console(width=PIPE_WIDTH)
    console.print(f"Device: {device}. Compute dtype: {answer['dtype']} ({reason}).\n", style="bold")
    table = Table("op", "backend", "level", "provider", "here", box=None, header_style="bold")
    previous = ""
    for row in answer["backends"]:
        op = "" if row["op"] == previous else row["op"]
        previous = row["op"]
        table.add_row(op, row["backend"], row["level"], row["provider"], _verdict(row))
    console.print(table)
    for plugin in answer["plugins"]:
        console.print(_plugin_line(plugin))
    for error in answer["errors"]:
        console.print(f"\nerror: {escape(error)}", style="red")


def _verdict(row: dict[str, Any]) -> str:
    if row["status"] == "selected":
        return f"[bold green]selected[/]  {escape(row['summary'])}"
    if row["status"] == "able":
        return f"can serve  [dim]{escape(row['summary'])}[/]"
    reasons = (f"{r['detail']}. {r['fix']}" if r["fix"] else r["detail"] for r in row["reasons"])
    return f"[yellow]cannot[/]: {escape('; '.join(reasons))}"


def _plugin_line(plugin: dict[str, str]) -> str:
    name = f"\nplugin [bold]{escape(plugin['plugin'])}[/] ({escape(plugin['provider'])}): "
    if plugin["status"] == "quarantined":
        again = f"`picotron quarantine clear {escape(plugin['plugin'])}` has it tried again."
        return f"{name}[red]quarantined[/]: {escape(plugin['error'])}. {again}"
    if plugin["status"] == "failed":
        return f"{name}[red]failed[/]: {escape(plugin['error'])}. --json has the traceback."
    if plugin["status"] == "inactive":
        return f"{name}installed, not enabled. Enable it with PICOTRON_PLUGINS={plugin['plugin']}."
    return f"{name}active"
