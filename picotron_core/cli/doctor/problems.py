"""What is wrong with a machine, each in one line that ends with how to mend it.

An error keeps training from starting, or from ending well, on the device that it would take; a
warning costs speed, space, or the use of something that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from picotron_core.cli.doctor.size import show_bytes
from picotron_core.errors import ConfigError
from picotron_core.hardware import refuse_cpu_without_torch
from picotron_core.wheels import INDEX, pip_line

Report = dict[str, Any]  # what --json prints
SLOW_SAVE_S = 60.0
PASSED_OVER = ("failed", "quarantined")  # kernels after which a run takes the next


@dataclass(frozen=True, slots=True)
class Problem:
    severity: Literal["error", "warning"]
    text: str


def find_problems(report: Report) -> list[Problem]:
    """Errors first; nothing twice."""
    found = [
        *_deaths(report),
        *_torch(report),
        *_gpus(report),
        *(Problem("error", text) for text in report["troubles"]),
        *_devices(report),
        *_launches(report),
        *_plugins(report),
        *_disk(report),
    ]
    return sorted(dict.fromkeys(found), key=lambda problem: problem.severity != "error")


def _deaths(report: Report) -> Iterator[Problem]:
    """What killed a child, but for kernels: their rows say it."""
    for death in report["deaths"]:
        doing, cause, evidence = death["doing"], death["cause"], death["evidence"]
        because = f"{cause}: {evidence}" if evidence else cause
        if doing["begin"] == "torch":
            yield Problem("error", _import_died(report, cause, evidence))
        elif doing["begin"] == "plugins":
            enabled = ", ".join(report["settings"]["plugins"])
            yield Problem(
                "error",
                f"Loading the enabled plugins ({enabled}) {because}. Enable them one by one to "
                "find which, and reinstall it; PICOTRON_PLUGINS=none trains without.",
            )
        elif doing["begin"] in ("cuda", "devices"):
            yield Problem(
                "error",
                f"Asking torch for its devices {because}. Update the GPU's driver, or train with "
                "--device cpu.",
            )
        elif doing["begin"] == "rate":
            yield Problem(
                "warning",
                f"Measuring {doing['dtype']} on {doing['place']} {because}. Take another dtype "
                "with --train.dtype, or another device.",
            )
        elif doing["begin"] != "launch":
            yield Problem(
                "error",
                f"The examination ({doing['begin']}) {because}. Check the settings, and reinstall "
                "Picotron.",
            )
    if (
        report["deaths"]
        and not report["complete"]
        and report["deaths"][-1]["doing"]["begin"]
        in (
            "launch",
            "rate",
        )
    ):
        text = "Not all was examined, for too much died. Mend the others, and run this again."
        yield Problem("warning", text)


def _import_died(report: Report, cause: str, evidence: str) -> str:
    machine = report["machine"]
    what = f"Importing torch {report['torch']['installed']} {cause}".replace("  ", " ")
    where = f" ({evidence})" if evidence else ""
    if "SIGILL" not in cause:
        return f"{what}{where}. Install it anew: {_install(report)} --force-reinstall"
    try:
        refuse_cpu_without_torch(tuple(machine["cpu_features"]), machine["architecture"])
    except ConfigError as error:
        return f"{what}: {error}"
    return (
        f"{what}: this CPU lacks an instruction that the build uses{where}. On a virtual machine "
        f"let it see the host's CPU; else install another build: {_install(report)} "
        "--force-reinstall"
    )


def _torch(report: Report) -> Iterator[Problem]:
    if error := report["torch"]["error"]:
        install = _install(report)
        if not error.startswith("ModuleNotFoundError: No module named 'torch'"):
            install += " --force-reinstall"
        yield Problem("error", f"torch cannot be imported: {error}. Install it: {install}")


def _install(report: Report) -> str:
    """The pip line for a torch that suits this machine."""
    for gpu in report["machine"]["gpus"]:
        if line := gpu["capability"] and pip_line(
            tuple(gpu["capability"]), report["torch"]["installed"]
        ):
            return str(line)
    return f"pip install 'torch>=2.6,<2.15' --index-url {INDEX}/cpu"


def _gpus(report: Report) -> Iterator[Problem]:
    """GPUs that are there, and that torch does not see."""
    machine, torch, wish = report["machine"], report["torch"], report["settings"]["device"]
    if wish not in ("auto", "cuda") or not torch["version"] or torch["cuda_available"]:
        return
    severity: Literal["error", "warning"] = "error" if wish == "cuda" else "warning"
    if machine["gpus"]:
        yield Problem(severity, _unseen(machine["gpus"][0], torch))
    elif machine["gpu_error"]:
        text = f"nvidia-smi cannot list the GPUs: {machine['gpu_error'].rstrip('.')}."
        yield Problem(severity, f"{text} Reinstall NVIDIA's driver, and restart the machine.")
    elif machine["nvidia_cards"] and not torch["hip"]:
        text = "An NVIDIA card is on the bus, but no driver: nvidia-smi is not there."
        yield Problem(severity, f"{text} Install NVIDIA's driver for it.")
    elif wish == "cuda":
        text = "device 'cuda' was asked for, but neither nvidia-smi nor torch sees a GPU."
        yield Problem("error", f"{text} Use --device cpu.")


def _unseen(gpu: Report, torch: Report) -> str:
    capability = tuple(gpu["capability"]) if gpu["capability"] else None
    shown = f"{gpu['name']} (compute capability {'.'.join(map(str, capability or ()))})"
    sees = f"nvidia-smi sees {shown if capability else gpu['name']}, but the installed torch"
    line = pip_line(capability, torch["version"]) if capability else ""
    if not torch["cuda"]:
        ours = "Install one with kernels for it: "
        theirs = "a CUDA build of torch for this machine: https://pytorch.org/get-started/locally"
        return f"{sees} {torch['version']} is a build for CPUs. {ours}{line or theirs}"
    why = torch["cuda_says"] or "CUDA_VISIBLE_DEVICES may hide it"
    older = line and f"/cu{torch['cuda'].replace('.', '')}" not in line
    fix = f"Update the driver ({gpu['driver']})" + (
        f", or install a build that asks less of it: {line}" if older else "."
    )
    return f"{sees} {torch['version']} (CUDA {torch['cuda']}) sees none: {why.rstrip('.')}. {fix}"


def _devices(report: Report) -> Iterator[Problem]:
    """Devices for which the build of torch has no code."""
    for device in report["devices"]:
        if device["refused"]:
            yield Problem("error" if device["chosen"] else "warning", device["refused"])


def _launches(report: Report) -> Iterator[Problem]:
    """Kernels that failed, and ops that nobody serves."""
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for row in report["launches"]:
        groups.setdefault((row["place"], row["op"], row["dtype"]), []).append(row)
    told: dict[tuple[str, str, str, str], list[str]] = {}
    for (place, op, dtype), rows in groups.items():
        queue = sorted((r for r in rows if r["turn"] is not None), key=lambda row: row["turn"])
        good = [r["backend"] for r in (*queue, *rows) if r["status"] in ("ok", "slow", "emulated")]
        fatal = _fatal(queue)
        for row in rows:
            if row["status"] not in (*PASSED_OVER, "died"):
                continue
            if row["needed"] and row is fatal:
                fix = "Train on another device or in another dtype"
                if good:
                    fix = f"Use --backends {op}={good[0].rpartition('/')[2]}"
                yield Problem("error", f"{_failure(row, dtype)}. {fix}.")
            else:
                told.setdefault((place, op, row["backend"], row["detail"]), []).append(dtype)
    for (place, op, name, detail), dtypes in told.items():
        row = {"place": place, "op": op, "backend": name, "detail": detail}
        fix = "update the package that it comes from"
        if detail.startswith("quarantined"):
            fix = f"`picotron quarantine clear {name.partition('/')[0]}` has it tried again"
        yield Problem("warning", f"{_failure(row, ', '.join(dtypes))}. It is passed over; {fix}.")


def _fatal(queue: list[Report]) -> Report | None:
    """The kernel that a run ends at: it passes over those that fail, but none that kills it."""
    stop = next((row for row in queue if row["status"] not in PASSED_OVER), None)
    if stop is None:
        return queue[0] if queue else None
    return stop if stop["status"] == "died" else None


def _failure(row: Report, dtypes: str) -> str:
    return f"{row['op']} by {row['backend']} in {dtypes} on {row['place']}: {row['detail']}"


def _plugins(report: Report) -> Iterator[Problem]:
    for plugin in report["plugins"]:
        name, error = plugin["plugin"], plugin["error"].rstrip(".")
        mend = f"Reinstall {plugin['distribution']}, or do not enable it."
        if plugin["status"] == "failed":
            yield Problem("warning", f"Plugin {name!r} failed to load: {error}. {mend}")
        elif plugin["status"] == "quarantined":
            again = f"`picotron quarantine clear {name}` has it tried again."
            yield Problem("warning", f"Plugin {name!r} is quarantined: {error}. {mend} {again}")


def _disk(report: Report) -> Iterator[Problem]:
    disk, keep = report["disk"], report["settings"]["keep"]
    folder = disk["folder"]
    if disk["error"]:
        text = f"Runs cannot be written to {folder}: {disk['error']}."
        yield Problem("error", f"{text} Choose another folder with --run.dir.")
        return
    size, fit = disk["checkpoint_bytes"], disk["checkpoints_that_fit"]
    if not size:
        return
    space = f"{folder} has {show_bytes(disk['free_bytes'])} free, and a checkpoint takes "
    if fit < 1:
        text = f"{space}{show_bytes(size)}. Free some, or choose another disk with --run.dir."
        yield Problem("error", text)
    elif fit <= keep:
        text = f"{space}{show_bytes(size)}: {keep} are kept, and one more while it is written."
        yield Problem("warning", f"{text} Free some, or lower --checkpoint.keep.")
    if disk["bytes_per_s"] and (took := size / disk["bytes_per_s"]) > SLOW_SAVE_S:
        text = (
            f"{folder} takes {show_bytes(disk['bytes_per_s'])}/s: a checkpoint takes {took:.0f} s."
        )
        yield Problem(
            "warning", f"{text} Save less often with --checkpoint.every, or use --run.dir."
        )
