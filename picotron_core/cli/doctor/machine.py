"""The machine as the operating system tells it, without torch: CPU, memory, GPUs."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from picotron_core.hardware import cpu_features

SMI_S = 20.0  # a wedged driver lets nvidia-smi hang for ever


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A card as nvidia-smi tells it."""

    name: str
    driver: str
    memory_bytes: int  # 0: not told
    capability: tuple[int, int] | None  # None: a driver too old to be asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    system: str
    python: str
    cpu: str
    architecture: str
    cpu_features: tuple[str, ...]
    cores: int  # that this process may use
    memory_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    gpu_error: str  # what nvidia-smi said instead of a list
    nvidia_cards: int  # on the PCI bus, with a driver or without


def look_at_machine() -> Machine:
    gpus, gpu_error = ask_nvidia_smi()
    total, available = _memory()
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=_cpu_name(),
        architecture=platform.machine(),
        cpu_features=cpu_features(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_bytes=total,
        available_bytes=available,
        gpus=gpus,
        gpu_error=gpu_error,
        nvidia_cards=_nvidia_cards(),
    )


def ask_nvidia_smi() -> tuple[tuple[Gpu, ...], str]:
    """The cards that nvidia-smi lists, and what went wrong; it is asked, and changes nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), ""
    said = ""
    for more in (",compute_cap", ""):  # an older nvidia-smi does not know the field
        fields = f"name,driver_version,memory.total{more}"
        command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        code, said = _run(command, SMI_S)
        if code == 0:
            rows = csv.reader(said.splitlines(), skipinitialspace=True)
            return tuple(_gpu(row) for row in rows if len(row) >= 3), ""
        if code is None:
            break
    return (), (said.strip().splitlines() or ["it failed without a word"])[0]


def _run(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: it did not start or end) and output, without waiting for what cannot die."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            return None, f"it cannot be started: {error}"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return None, f"no answer in {seconds:.0f} s"
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _gpu(row: Sequence[str]) -> Gpu:
    name, driver, memory, *rest = row
    major, _, minor = (rest[0] if rest else "").partition(".")
    known = major.isdigit() and minor.isdigit()
    return Gpu(
        name=name,
        driver=driver,
        memory_bytes=int(memory) * 2**20 if memory.isdigit() else 0,  # or "[N/A]"
        capability=(int(major), int(minor)) if known else None,
    )


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    return _field(cpuinfo, "model name") or platform.processor() or platform.machine()


def _memory(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Bytes in all, and those that may still be had; 0 where the system does not tell."""
    return _kibibytes(_field(meminfo, "MemTotal")), _kibibytes(_field(meminfo, "MemAvailable"))


def _kibibytes(text: str) -> int:
    number = text.partition(" ")[0]
    return int(number) * 1024 if number.isdigit() else 0


def _field(path: Path, key: str) -> str:
    """The first value of a key in a file of "key : value" lines; "" where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return ""
    values = (
        value for name, _, value in (line.partition(":") for line in lines) if name.strip() == key
    )
    return next(values, "").strip()


def _nvidia_cards(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """Display controllers by NVIDIA on the PCI bus: they are there without any driver."""
    count = 0
    for folder in devices.glob("*"):
        try:
            vendor, kind = ((folder / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:  # unplugged in this moment, or not to be read: no card that we can use
            continue
        count += vendor == "0x10de" and kind.startswith("0x03")
    return count
