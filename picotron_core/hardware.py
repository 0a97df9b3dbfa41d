"""What the device is: one frozen `Device`, from a real look or a named profile of a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from picotron_core.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """All that selection and precision may know of a device. Plain data: tests make their own."""

    type: str  # torch's device type: "cpu", "cuda"
    name: str
    capability: tuple[int, int] | None = None  # CUDA compute capability
    memory_bytes: int = 0
    native_bfloat16: bool = False  # in hardware; torch counts emulation too, which is no use
    arch_list: tuple[str, ...] = ()  # what the installed torch was compiled for
    simulated: bool = False

    @property
    def below_ampere(self) -> bool:
        """No flash kernel and no bfloat16: CUDA before compute capability 8.0."""
        return self.capability is not None and self.capability < (8, 0)

    def __str__(self) -> str:
        capability = "" if self.capability is None else " sm_{}{}".format(*self.capability)
        return f"{self.name}{capability}{' (simulated)' if self.simulated else ''}"


def _card(name: str, capability: tuple[int, int], gib: float) -> Device:
    return Device(
        type="cuda",
        name=name,
        capability=capability,
        memory_bytes=int(gib * 2**30),
        native_bfloat16=capability >= (8, 0),
        arch_list=("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
        simulated=True,
    )


# Compute capabilities and memory: NVIDIA's published tables. The arch list is the cu126 wheel's.
PROFILES = {
    "cpu": Device(type="cpu", name="CPU", memory_bytes=16 * 2**30, simulated=True),
    "gtx1080": _card("GTX 1080", (6, 1), 8),
    "p100": _card("Tesla P100", (6, 0), 16),
    "v100": _card("Tesla V100", (7, 0), 16),
    "t4": _card("Tesla T4", (7, 5), 15),
    "a100": _card("A100", (8, 0), 40),
    "h100": _card("H100", (9, 0), 80),
}


def profile(name: str) -> Device:
    """The card of that name, for asking what would happen on a machine that is not there."""
    try:
        return PROFILES[name.lower()]
    except KeyError:
        raise ConfigError(f"No device profile {name!r}. {did_you_mean(name, PROFILES)}") from None


@cache
def look(kind: str = "auto", index: int = 0) -> Device:
    """The device that is really here; a CUDA device becomes torch's current one.

    Args:
        kind: auto, cpu or cuda.
        index: which of this machine's CUDA devices: a process's local rank.

    Raises: ConfigError where there is none such.
    """
    import torch

    if kind not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"No device {kind!r}. {did_you_mean(kind, ('auto', 'cpu', 'cuda'))}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device 'cuda' was asked for, but torch sees no CUDA device. Use --run.device cpu, or "
            "install a CUDA build of torch and check the driver with nvidia-smi."
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
    capability = (properties.major, properties.minor)
    return Device(
        type="cuda",
        name=properties.name,
        capability=capability,
        memory_bytes=properties.total_memory,
        native_bfloat16=capability >= (8, 0),
        arch_list=tuple(torch.cuda.get_arch_list()),
    )


def _look_at_cpu() -> Device:
    import os
    import platform

    import torch

    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        memory_bytes = 0
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return replace(
        PROFILES["cpu"],
        name=f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        memory_bytes=memory_bytes,
        native_bfloat16=bool(native),
        simulated=False,
    )
