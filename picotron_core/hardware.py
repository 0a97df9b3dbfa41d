"""What the device is: one frozen `Device`, from a real look or a named profile of a card."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from picotron_core.errors import ConfigError, did_you_mean
from picotron_core.wheels import builds, has_kernels, pip_line

KINDS = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """All that selection and precision may know of a device. Plain data: tests make their own."""

    type: str  # torch's device type: "cpu", "cuda"
    name: str
    capability: tuple[int, int] | None = None  # CUDA compute capability
    memory_bytes: int = 0
    native_bfloat16: bool = False  # in hardware; torch counts emulation too, which is no use
    arch_list: tuple[str, ...] = ()  # what the installed torch was compiled for
    torch: str = ""  # its version, "2.13.0+cu126"
    cuda: str = ""  # the CUDA version that torch was built with
    driver: str = ""  # the GPU driver's version
    cpu_features: tuple[str, ...] = ()  # of those that matter here: `CPU_FEATURES`
    simulated: bool = False

    @property
    def below_ampere(self) -> bool:
        """No flash kernel and no bfloat16: CUDA before compute capability 8.0."""
        return self.capability is not None and self.capability < (8, 0)

    def __str__(self) -> str:
        capability = "" if self.capability is None else " sm_{}{}".format(*self.capability)
        return f"{self.name}{capability}{' (simulated)' if self.simulated else ''}"


def device_of(record: Mapping[str, Any]) -> Device:
    """A device from its `dataclasses.asdict`, which has been through JSON: that knows no tuples."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Device(**fields)


def _card(name: str, capability: tuple[int, int], gib: float) -> Device:
    return Device(
        type="cuda",
        name=name,
        capability=capability,
        memory_bytes=int(gib * 2**30),
        native_bfloat16=capability >= (8, 0),
        simulated=True,
    )


# Compute capabilities and memory: NVIDIA's published tables.
PROFILES = {
    "cpu": Device(type="cpu", name="CPU", memory_bytes=16 * 2**30, simulated=True),
    "gtx980": _card("GTX 980", (5, 2), 4),
    "gtx1080": _card("GTX 1080", (6, 1), 8),
    "p100": _card("Tesla P100", (6, 0), 16),
    "v100": _card("Tesla V100", (7, 0), 16),
    "t4": _card("Tesla T4", (7, 5), 15),
    "rtx2080": _card("RTX 2080", (7, 5), 8),
    "a100": _card("A100", (8, 0), 40),
    "rtx3090": _card("RTX 3090", (8, 6), 24),
    "rtx4090": _card("RTX 4090", (8, 9), 24),
    "h100": _card("H100", (9, 0), 80),
    "rtx5090": _card("RTX 5090", (12, 0), 32),
}


def profile(name: str) -> Device:
    """A card that is not there, for asking what would happen on it.

    Args:
        name: a card, with the newest torch that has kernels for it; or card@build, a published
            build of torch: "p100@2.13+cu130", "p100@cu130" for the newest torch with that CUDA, or
            "p100@2.13" for that torch with its newest CUDA.

    Raises: ConfigError for a card or a build that is not known.
    """
    card, _, wish = name.lower().partition("@")
    if card not in PROFILES:
        raise ConfigError(f"No device profile {name!r}. {did_you_mean(card, PROFILES)}")
    device = PROFILES[card]
    if device.capability is None:
        return device
    published = {f"{build.torch}+{build.cuda}": build for build in builds()}
    if wish:
        fitting = [b for full, b in published.items() if wish in (full, b.cuda, b.torch)]
        if not fitting:
            raise ConfigError(f"No build {wish!r} of torch. {did_you_mean(wish, published)}")
    else:
        fitting = [b for b in published.values() if has_kernels(b.arch_list, device.capability)]
    build = fitting[-1]
    return replace(
        device,
        arch_list=build.arch_list,
        torch=f"{build.torch}.0+{build.cuda}",
        cuda=f"{build.cuda[2:-1]}.{build.cuda[-1]}",
    )


def find(wish: str = "auto", index: int = 0) -> Device:
    """The device that is wished for: auto, cpu, cuda, or a profile that stands in for one.

    Raises: ConfigError for an unknown name, or where there is none such.
    """
    if wish.lower() in KINDS:
        return look(wish.lower(), index)
    if wish.partition("@")[0].lower() not in PROFILES:
        raise ConfigError(f"No device {wish!r}. {did_you_mean(wish, (*KINDS, *PROFILES))}")
    return profile(wish)


def stand_in(device: Device, index: int = 0) -> Device:
    """The real device that runs what was decided for `device`: itself, unless it is simulated."""
    if not device.simulated:
        return device
    return look("cpu" if device.type == "cpu" else "auto", index)


@cache
def look(kind: str = "auto", index: int = 0) -> Device:
    """The device that is really here; a CUDA device becomes torch's current one.

    Args:
        kind: auto, cpu or cuda.
        index: which of this machine's CUDA devices: a process's local rank.

    Raises: ConfigError where there is none such.
    """
    import torch

    if kind not in KINDS:
        raise ConfigError(f"No device {kind!r}. {did_you_mean(kind, KINDS)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device 'cuda' was asked for, but torch sees no CUDA device. Use --run.device cpu, or "
            "see with `picotron doctor` what is missing."
        )
    if kind == "cpu" or not torch.cuda.is_available():
        return _look_at_cpu()
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"Local rank {index} has no GPU: torch sees {torch.cuda.device_count()}. Start no more "
            "processes than GPUs on a machine, or use --run.device cpu."
        )
    torch.cuda.set_device(index)  # or every rank would probe and allocate on the first
    properties = torch.cuda.get_device_properties(index)
    # AMD's gfx numbers are no compute capabilities, and its architectures no cubins.
    nvidia = torch.version.hip is None
    capability = (properties.major, properties.minor) if nvidia else None
    gfx = getattr(properties, "gcnArchName", "").partition(":")[0]
    return Device(
        type="cuda",
        name=properties.name,
        capability=capability,
        memory_bytes=properties.total_memory,
        native_bfloat16=capability >= (8, 0) if capability else gfx.startswith(AMD_BFLOAT16),
        arch_list=tuple(torch.cuda.get_arch_list()) if nvidia else (),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        driver=driver_version(),
        cpu_features=cpu_features(),
    )


# CDNA 2 and later and RDNA 3 and later have matrix instructions for it.
AMD_BFLOAT16 = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


def refuse_without_kernels(device: Device) -> None:
    """Raise ConfigError where the installed torch has no code for the device.

    torch would only warn, and die of its first kernel.
    """
    if device.type != "cuda" or device.capability is None or not device.arch_list:
        return  # not NVIDIA's, or a torch that does not say
    if has_kernels(device.arch_list, device.capability):
        return
    capability = "{}.{}".format(*device.capability)
    line = pip_line(device.capability, device.torch)
    fix = (
        f"Install one that has: {line}"
        if line
        else "No build of torch 2.6 to 2.14 that is known here has: see https://pytorch.org for "
        "this machine, or build torch from source"
    )
    raise ConfigError(
        f"{device.name} has compute capability {capability}, and the installed torch "
        f"{device.torch} has kernels for {' '.join(device.arch_list)} only. {fix}, or train on the "
        "CPU with --device cpu."
    )


# What decides whether torch starts at all, and which dtypes and matrix units a CPU has.
CPU_FEATURES = (
    *("sse4_1", "avx", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"),  # x86
    *("asimd", "sve", "bf16"),  # Arm
)


@cache
def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of `CPU_FEATURES` that this CPU has, by Linux's account; empty elsewhere."""
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, words = line.partition(":")
                if name.strip().lower() in ("flags", "features"):
                    have = set(words.split())
                    return tuple(feature for feature in CPU_FEATURES if feature in have)
    except OSError:
        pass
    return ()


def refuse_cpu_without_torch(
    features: tuple[str, ...] | None = None, machine: str = platform.machine()
) -> None:
    """Raise ConfigError, before torch is imported, where the import would die of SIGILL.

    torch's x86 builds need SSE 4.1 since 2.1 (pytorch#116623). Python cannot catch the signal.
    """
    features = cpu_features() if features is None else features
    if machine.lower() in ("x86_64", "amd64") and features and "sse4_1" not in features:
        raise ConfigError(
            "This CPU has no SSE 4.1, which torch's builds need: importing torch would kill the "
            "process. On a virtual machine let it see the host's CPU; else build torch from source."
        )


def driver_version(version: Path = Path("/sys/module/nvidia/version")) -> str:
    """NVIDIA's kernel driver, as Linux tells it; "" where there is none to be seen."""
    try:
        return version.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _look_at_cpu() -> Device:
    import torch

    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        memory_bytes = 0
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Device(
        type="cpu",
        name=f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        memory_bytes=memory_bytes,
        native_bfloat16=bool(native),
        torch=torch.__version__,
        cpu_features=cpu_features(),
    )
