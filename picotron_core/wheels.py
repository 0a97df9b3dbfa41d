"""Which GPUs an installed torch has kernels for, and the pip line for those it has none for.

A build of torch holds machine code (`sm_75`) for some compute capabilities, and perhaps PTX
(`compute_120`), which the driver compiles for newer ones. torch itself only warns of a card that
it has no code for, and fails at the first launch.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Capability = tuple[int, int]

# Jetson and Drive chips: their code and that of cards of the same major version do not mix
# (CUDA C++ Programming Guide, binary compatibility).
EMBEDDED = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0)})

_OLD = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"
_VOLTA = "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
_TURING = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
_TURING_PTX = f"{_TURING} compute_120"

# The builds that the PyTorch project publishes for Linux on x86-64, newest CUDA last, by torch's
# minor version. From the release announcements and build scripts (pytorch#164471, #172352,
# #175253, #178665, #182849, #197555). For advice alone: whether a card runs is decided by what the
# installed torch says of itself.
BUILDS: dict[str, dict[str, str]] = {
    "2.6": {"cu118": _OLD, "cu124": _OLD, "cu126": _OLD},
    "2.7": {"cu118": _OLD, "cu126": _OLD, "cu128": _TURING_PTX},
    "2.8": {"cu126": _OLD, "cu128": _VOLTA, "cu129": _VOLTA},
    "2.9": {"cu126": _OLD, "cu128": _VOLTA, "cu130": _TURING_PTX},
    "2.10": {"cu126": _OLD, "cu128": _VOLTA, "cu130": _TURING_PTX},
    "2.11": {"cu126": _OLD, "cu128": _TURING, "cu130": _TURING_PTX},
    "2.12": {"cu126": _OLD, "cu130": _TURING_PTX, "cu132": _TURING_PTX},
    "2.13": {"cu126": _OLD, "cu130": _TURING_PTX, "cu132": _TURING_PTX},
    "2.14": {"cu126": _OLD, "cu130": _TURING_PTX, "cu132": _TURING_PTX},
}
INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True, slots=True)
class Build:
    """A published build of torch: its minor version, the CUDA it brings, the code it holds."""

    torch: str  # "2.13"
    cuda: str  # "cu126"
    arch_list: tuple[str, ...]


def builds() -> Iterator[Build]:
    """Every published build, oldest first."""
    for version, by_cuda in BUILDS.items():
        for cuda, archs in by_cuda.items():
            yield Build(version, cuda, tuple(archs.split()))


def has_kernels(arch_list: Iterable[str], capability: Capability) -> bool:
    """Whether a build with this `torch.cuda.get_arch_list()` holds code for the capability."""
    return any(_runs_on(arch, capability) for arch in arch_list)


def _runs_on(arch: str, capability: Capability) -> bool:
    kind, _, digits = arch.partition("_")
    number = digits.rstrip("af")
    if kind not in ("sm", "compute") or not number.isdigit():
        return False
    code = divmod(int(number), 10)
    if digits.endswith("a"):  # uses what only this very chip has: sm_90a
        return code == capability
    if kind == "compute" and not digits.endswith("f"):  # PTX: the driver compiles it for newer ones
        return code <= capability
    if EMBEDDED & {code, capability}:
        return code == capability
    return code[0] == capability[0] and code[1] <= capability[1]


def pip_line(capability: Capability, installed: str, machine: str = platform.machine()) -> str:
    """The command that installs a torch with kernels for the capability; "" where none is known.

    Args:
        installed: the version of the torch that is there ("2.13.0+cu130"): kept, if one of its
            builds will do, or else the newest that does.
        machine: the host's processor; only for x86-64 are the builds known here.
    """
    if machine.lower() not in ("x86_64", "amd64"):
        return ""
    serving = [build for build in builds() if has_kernels(build.arch_list, capability)]
    if not serving:
        return ""
    release = installed.partition("+")[0]
    minor = ".".join(release.split(".")[:2])
    # Of several, the one with the oldest CUDA: it asks least of the driver.
    kept = next((build for build in serving if build.torch == minor), None)
    # A vendor's or a nightly's number is on no index: then any release of that minor version.
    if kept and not re.fullmatch(r"\d+\.\d+\.\d+", release):
        wanted = f"'torch=={kept.torch}.*' --force-reinstall"
        return f"pip install {wanted} --index-url {INDEX}/{kept.cuda}"
    if kept:
        # With the build in the version: pip takes any build of the release that is there for it.
        return f"pip install torch=={release}+{kept.cuda} --index-url {INDEX}/{kept.cuda}"
    newest = next(build for build in serving if build.torch == serving[-1].torch)
    return f"pip install 'torch=={newest.torch}.*' --index-url {INDEX}/{newest.cuda}"
