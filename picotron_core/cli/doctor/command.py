"""`picotron doctor`: examine, print, and say by the exit code whether training can start here."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from picotron_core.cli.doctor.child import Findings, Task, examine_in_children
from picotron_core.cli.doctor.disk import try_disk
from picotron_core.cli.doctor.facts import device_row
from picotron_core.cli.doctor.machine import look_at_machine
from picotron_core.cli.doctor.problems import find_problems
from picotron_core.cli.doctor.show import show_report
from picotron_core.cli.terminal import open_console
from picotron_core.config import Settings
from picotron_core.hardware import KINDS, Device, find

CHECKPOINT_BYTES = 12  # a parameter: its float32 master and two moments
GROUP = "picotron"  # of entry points; what registry.plugins says, which imports torch
PIPE_WIDTH = 160  # columns where no terminal says how many there are
UNABLE = 1  # the exit code where training could not start, or not end well
NO_TORCH = {
    **{"error": "", "version": "", "cuda": "", "hip": "", "arch_list": []},
    **{"cuda_available": False, "cuda_says": "", "cpu_capability": ""},
}


def run_doctor(settings: Settings, *, as_json: bool) -> int:
    """Print what was found; exit code 1 where something keeps training from this device."""
    wish = settings.config.run.device
    # A real device is asked for in the child, an unknown name is an error here.
    simulated = None if wish.lower() in KINDS else find(wish)
    console = open_console(width=PIPE_WIDTH)
    if console.is_terminal and not as_json:
        with console.status("Launching every kernel: half a minute"):
            report = examine(settings, simulated)
    else:
        report = examine(settings, simulated)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show_report(console, report)
    return 0 if report["can_train"] else UNABLE


def examine(settings: Settings, simulated: Device | None) -> dict[str, Any]:
    """The report: what `--json` prints."""
    config = settings.config
    task = Task(
        config=config.model_dump(mode="json"),
        rules=tuple((rule.op, rule.names, rule.source) for rule in settings.rules),
        launch=simulated is None,
    )
    machine = look_at_machine()
    findings = examine_in_children(task)
    torch = next(iter(findings.of("torch")), NO_TORCH)
    model = next(iter(findings.of("model")), {"parameters": 0})
    devices = next(iter(findings.of("devices")), {"devices": [], "compute": ""})
    report: dict[str, Any] = {
        "machine": asdict(machine),
        "settings": {
            "device": config.run.device.lower(),
            "plugins": _enabled(settings),
            "keep": config.checkpoint.keep,
        },
        "torch": {"installed": _installed("torch"), **NO_TORCH, **_bare(torch)},
        "devices": [device_row(simulated.type, simulated, True)]
        if simulated
        else devices["devices"],
        "compute": devices["compute"],
        "launches": _launches(findings),
        "rates": [_bare(record) for record in findings.of("rate")],
        "plugins": _plugins(findings),
        "disk": _disk(Path(config.run.dir), model["parameters"]),
        "troubles": [record["text"] for record in findings.of("trouble")],
        "deaths": [asdict(death) for death in findings.deaths],
        "complete": findings.complete,
    }
    problems = find_problems(report)
    report["problems"] = [asdict(problem) for problem in problems]
    report["can_train"] = all(problem.severity != "error" for problem in problems)
    return report


def _enabled(settings: Settings) -> list[str]:
    """The plugins that are enabled by name, or by the name of one of their backends."""
    names = (name for rule in settings.rules for name in rule.names if "/" in name)
    return [*settings.config.plugins.enable, *(name.split("/")[0] for name in names)]


def _installed(distribution: str) -> str:
    """A version by its metadata, without an import; "" where it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _bare(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("done", "begin")}


def _launches(findings: Findings) -> list[dict[str, Any]]:
    """Every launch, those among them that killed the child."""
    rows = [_bare(record) for record in findings.of("launch")]
    for death in findings.deaths:
        if death.doing["begin"] == "launch":
            detail = f"{death.cause}: {death.evidence}" if death.evidence else death.cause
            rows.append({**_bare(death.doing), "status": "died", "detail": detail})
    return rows


def _plugins(findings: Findings) -> list[dict[str, Any]]:
    """Every installed plugin and its state. None is imported here; the child says what loaded."""
    loaded = {row["plugin"]: row for record in findings.of("plugins") for row in record["plugins"]}
    unknown = {"status": "unknown", "error": "", "traceback": ""}  # the child did not come so far
    return [
        {
            "plugin": point.name,
            "distribution": point.dist.name if point.dist else "unknown",
            "version": point.dist.version if point.dist else "unknown",
            **loaded.get(point.name, unknown),
        }
        for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)
    ]


def _disk(runs: Path, parameters: int) -> dict[str, Any]:
    disk = try_disk(runs)
    size = CHECKPOINT_BYTES * parameters
    fit = disk.free_bytes // size if size else 0
    return {**asdict(disk), "checkpoint_bytes": size, "checkpoints_that_fit": fit}
