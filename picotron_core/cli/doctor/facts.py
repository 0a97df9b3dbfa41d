"""What torch and the build of it say, as the report has it. torch is imported by request alone."""

from __future__ import annotations

import importlib
import warnings

from picotron_core.cli.doctor.child import Record
from picotron_core.errors import PicotronError, one_line, reason
from picotron_core.hardware import Device, refuse_without_kernels


def import_torch() -> str:
    """The error of the import; "" where there is none."""
    try:
        importlib.import_module("torch")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises is the finding
        return f"{type(error).__name__}: {reason(error)}"
    return ""


def torch_facts(ask_driver: bool) -> Record:
    """What the installed torch says of itself and, if it is to be asked, of CUDA's devices."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # It warns of a driver that is too old.
        available = ask_driver and torch.cuda.is_available()
    why = [str(warning.message) for warning in said if "CUDA" in str(warning.message)]
    if torch.version.cuda and ask_driver and not available:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            why.append(str(error))
    # get_arch_list() is empty without a usable driver, just when one wants to know.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)() if torch.version.cuda else None
    return {
        "error": "",
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "hip": torch.version.hip or "",
        "arch_list": flags.split() if flags else [],
        "cuda_available": available,
        "cuda_says": one_line(why[0]) if why else "",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def device_row(place: str, device: Device, chosen: bool) -> Record:
    """A device as the report has it, with what the build of torch lacks for it."""
    refused = ""
    try:
        refuse_without_kernels(device)
    except PicotronError as error:
        refused = str(error)
    return {
        "place": place,
        "name": device.name,
        "capability": device.capability,
        "memory_bytes": device.memory_bytes,
        "driver": device.driver,
        "simulated": device.simulated,
        "chosen": chosen,
        "refused": refused,
    }
