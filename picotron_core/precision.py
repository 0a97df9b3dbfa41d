"""Which dtypes a run computes, sums and keeps its numbers in, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from picotron_core.errors import ConfigError
from picotron_core.hardware import Device

DTYPES = ("bfloat16", "float16", "float32")  # the first that every device is good at is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """torch's names of the dtypes of a run.

    compute: of weights, activations and their gradients in forward and backward.
    gradient: that the gradients of micro-batches are added up in.
    reduce: that gradients travel between ranks in.
    master: of the weights that are updated, and of the optimizer's states.
    """

    compute: str
    reason: str
    gradient: str = "float32"
    reduce: str = "float32"
    master: str = "float32"

    @property
    def scales_loss(self) -> bool:
        """float16's smallest numbers lose gradients, unless the loss is scaled up."""
        return self.compute == "float16"

    def __str__(self) -> str:
        travel = f"; gradients travel in {self.reduce}" if self.reduce != "float32" else ""
        return f"{self.compute} ({self.reason}); {self.master} masters{travel}"


def choose_precision(wanted: str, devices: Sequence[Device], *, reduce: str = "auto") -> Precision:
    """One policy for all ranks: the best dtype that every device computes in by itself.

    bfloat16 from compute capability 8.0 and on CPUs with instructions for it; float16 on 7.x and
    6.0; float32 on 6.1 and 5.x, where float16 is slower. float16 on a CPU only if asked for.

    Args:
        wanted: auto, float32, bfloat16 or float16.
        devices: every rank's; different dtypes could not meet in one collective.
        reduce: auto is float32, which loses nothing; 16 bits halve the traffic.

    Raises: ConfigError for a dtype that a device has not, or only emulates: it would be slower than
        float32, and torch itself would not say so.
    """
    compute, reason = _compute(wanted, devices)
    if reduce == "float16" and compute != "float16":
        raise ConfigError(
            f"train.reduce_dtype = 'float16', but the run computes in {compute} without a loss "
            "scale: its sums would overflow. Use --train.reduce_dtype bfloat16."
        )
    reduce = "float32" if reduce == "auto" else reduce
    return Precision(compute=compute, reason=reason, reduce=reduce)


def _compute(wanted: str, devices: Sequence[Device]) -> tuple[str, str]:
    """The compute dtype, and why."""
    kinds = list(dict.fromkeys(devices))
    if wanted != "auto":
        for device in kinds:
            if reason := _lacks(device, wanted):
                best, _ = _compute("auto", kinds)
                raise ConfigError(
                    f"train.dtype = {wanted!r}, but {reason}. Use --train.dtype {best}."
                )
        return wanted, "asked for"
    for dtype in DTYPES:
        if all(dtype in _good_dtypes(device) for device in kinds):
            return dtype, _why(dtype, kinds)
    raise AssertionError("every device has float32")


def _good_dtypes(device: Device) -> frozenset[str]:
    """What `auto` may take on a device."""
    if device.type == "cpu":  # float16 products take a CPU many times as long as float32 ones
        return frozenset({"float32", "bfloat16"} if device.native_bfloat16 else {"float32"})
    if device.native_bfloat16:
        return frozenset(DTYPES)
    capability = device.capability or (0, 0)
    fast_float16 = capability >= (7, 0) or capability == (6, 0)
    return frozenset({"float32", "float16"} if fast_float16 else {"float32"})


def _lacks(device: Device, dtype: str) -> str:
    """Why a device must not be asked for a dtype; "" where it may."""
    if dtype == "bfloat16" and not device.native_bfloat16:
        return f"{device} would only emulate it, slower than float32"
    if dtype == "float16" and device.type == "cuda" and dtype not in _good_dtypes(device):
        return f"{device} computes in it many times slower than in float32"
    return ""


def _why(dtype: str, kinds: Sequence[Device]) -> str:
    if dtype == "float32":
        limit = [device for device in kinds if len(_good_dtypes(device)) == 1]
        if not limit:
            return f"{' and '.join(map(str, kinds))} share no 16-bit dtype"
        better = "native bfloat16" if limit[0].type == "cpu" else "fast 16-bit arithmetic"
        return f"{limit[0]} has no {better}"
    if dtype == "float16":
        limit = [device for device in kinds if not device.native_bfloat16]
        return f"{limit[0]} has it in hardware, and no bfloat16; the loss is scaled"
    return f"{' and '.join(map(str, kinds))} {'has' if len(kinds) == 1 else 'have'} it in hardware"
