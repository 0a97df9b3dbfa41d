"""The report as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from picotron_core.cli.doctor.size import show_bytes

Report = dict[str, Any]
DTYPES = ("float32", "float16", "bfloat16")
STYLES = {"ok": "green", "failed": "bold red", "quarantined": "bold red", "died": "bold red"}


def show_report(console: Console, report: Report) -> None:
    for title, lines in (
        ("Machine", _machine(report["machine"])),
        ("torch", _torch(report["torch"])),
        ("Devices", _devices(report)),
    ):
        _section(console, title, lines)
    for place in dict.fromkeys(row["place"] for row in report["launches"]):
        rows = [row for row in report["launches"] if row["place"] == place]
        console.print(f"\nLaunches on {place}  (* serves first)", style="bold")
        console.print(_launch_table(rows))
        for line in _refusals(rows):
            console.print(f"  {line}", style="dim")
    for title, lines in (
        ("Speed", _speed(report["rates"])),
        ("Plugins", [_plugin(plugin) for plugin in report["plugins"]] or ["none installed"]),
        ("Disk", _disk(report["disk"])),
    ):
        _section(console, title, lines)
    _section(console, "Problems", [])
    for problem in report["problems"]:
        style = "red" if problem["severity"] == "error" else "yellow"
        console.print(f"  [{style}]{problem['severity']}[/]: {escape(problem['text'])}")
    if not report["problems"]:
        console.print("  [green]No problem found.[/]")


def _section(console: Console, title: str, lines: Iterable[str]) -> None:
    console.print(title if title == "Machine" else f"\n{title}", style="bold")
    for line in lines:
        console.print(f"  {escape(line)}")


def _machine(machine: Report) -> Iterable[str]:
    yield f"{machine['system']}, Python {machine['python']}"
    features = " ".join(machine["cpu_features"]) or "features unknown"
    cores = f"{machine['cores']} core{'s' * (machine['cores'] != 1)}"
    yield f"{machine['cpu']} ({machine['architecture']}: {features}), {cores}"
    if machine["memory_bytes"]:
        free = show_bytes(machine["available_bytes"])
        yield f"{show_bytes(machine['memory_bytes'])} of memory, {free} available"
    for gpu in machine["gpus"]:
        capability = ".".join(map(str, gpu["capability"] or ("unknown",)))
        memory = show_bytes(gpu["memory_bytes"]) if gpu["memory_bytes"] else "memory unknown"
        driver = f"driver {gpu['driver']}"
        yield f"{gpu['name']}, compute capability {capability}, {memory}, {driver} (nvidia-smi)"
    if not machine["gpus"]:
        cards = machine["nvidia_cards"]
        yield f"no GPU by nvidia-smi{f', {cards} NVIDIA on the bus' if cards else ''}"


def _torch(torch: Report) -> Iterable[str]:
    if not torch["version"]:
        yield f"cannot be examined; installed: {torch['installed'] or 'none'}"
        return
    cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
    build = f"ROCm {torch['hip']}" if torch["hip"] else cuda
    archs = f", kernels for {' '.join(torch['arch_list'])}" if torch["arch_list"] else ""
    yield f"{torch['version']}, {build}{archs}; CPU code for {torch['cpu_capability']}"
    if torch["cuda"]:
        says = f": {torch['cuda_says']}" if torch["cuda_says"] else ""
        yield f"{'sees CUDA devices' if torch['cuda_available'] else 'uses no CUDA device'}{says}"


def _devices(report: Report) -> Iterable[str]:
    for device in report["devices"]:
        capability = (
            "" if device["capability"] is None else " sm_{}{}".format(*device["capability"])
        )
        compute = f", and compute in {report['compute']}" if report["compute"] else ""
        takes = f": training would take it{compute}" if device["chosen"] else ""
        simulated = " (simulated: nothing is launched)" if device["simulated"] else ""
        refused = ": torch has no kernels for it" if device["refused"] else ""
        yield f"{device['place']}  {device['name']}{capability}{simulated}{refused or takes}"
    if not report["devices"]:
        yield "none examined"


def _launch_table(rows: list[Report]) -> Table:
    table = Table("  op", "backend", *DTYPES, box=None, header_style="bold", pad_edge=False)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        status = row["status"] + (" *" if row["turn"] == 0 else "")
        style = STYLES.get(row["status"], "yellow")
        cells.setdefault((row["op"], row["backend"]), {})[row["dtype"]] = f"[{style}]{status}[/]"
    previous = ""
    for (op, backend), by_dtype in sorted(cells.items(), key=lambda item: _order(rows, item[0][0])):
        shown = "" if op == previous else op
        previous = op
        table.add_row(f"  {shown}", escape(backend), *(by_dtype.get(d, "") for d in DTYPES))
    return table


def _order(rows: list[Report], op: str) -> int:
    return next(number for number, row in enumerate(rows) if row["op"] == op)


def _refusals(rows: list[Report]) -> Iterable[str]:
    """Why not, a line for each reason; failures are among the problems."""
    told: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] == "refused":
            key = (row["op"], row["backend"], row["detail"])
            told.setdefault(key, []).append(row["dtype"])
    for (op, backend, detail), dtypes in told.items():
        yield escape(f"{op} by {backend} in {', '.join(dtypes)}: {detail}")


def _speed(rates: list[Report]) -> Iterable[str]:
    for place in dict.fromkeys(rate["place"] for rate in rates):
        mine = [rate for rate in rates if rate["place"] == place]
        yield f"{place}  " + ", ".join(map(_rate, mine))
    if not rates:
        yield "not measured"


def _rate(rate: Report) -> str:
    copy = rate["dtype"] == "copy"
    what = "copies" if copy else f"{rate['dtype']} products"
    if rate["per_s"] is None:
        return f"{what} fail ({rate['error']})"
    return f"{what} {rate['per_s'] / 1e9:.3g} {'GB/s' if copy else 'GFLOP/s'}"


def _plugin(plugin: Report) -> str:
    name = f"{plugin['plugin']} ({plugin['distribution']} {plugin['version']}): {plugin['status']}"
    if plugin["status"] == "inactive":
        return f"{name}. Enable it with PICOTRON_PLUGINS={plugin['plugin']}."
    return f"{name}: {plugin['error']}" if plugin["error"] else name


def _disk(disk: Report) -> Iterable[str]:
    if disk["error"]:
        yield f"{disk['folder']}: {disk['error']}"
        return
    rate = "not tried" if disk["bytes_per_s"] is None else f"{show_bytes(disk['bytes_per_s'])}/s"
    yield f"{disk['folder']}: written at {rate}, {show_bytes(disk['free_bytes'])} free"
    if size := disk["checkpoint_bytes"]:
        fit = f"{disk['checkpoints_that_fit']:,}".replace(",", " ")
        yield f"a checkpoint of this model takes {show_bytes(size)}: {fit} fit"
