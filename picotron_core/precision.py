"""Which dtype a run computes in, and why. Master weights and moments are float32 always."""

from __future__ import annotations

from dataclasses import dataclass

from picotron_core.errors import ConfigError
from picotron_core.hardware import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """compute: torch's name of the dtype of weights and activations in forward and backward."""

    compute: str
    reason: str


def choose_precision(wanted: str, device: Device) -> Precision:
    """The compute dtype for a device.

    Args:
        wanted: auto, float32 or bfloat16.

    Raises: ConfigError for bfloat16 on a device that would only emulate it: it would be slower
        than float32, and torch itself would not say so.
    """
    native = device.native_bfloat16
    if wanted == "auto":
        if native:
            return Precision(compute="bfloat16", reason=f"{device} has it in hardware")
        return Precision(compute="float32", reason=f"{device} has no native bfloat16")
    if wanted == "bfloat16" and not native:
        raise ConfigError(
            f"train.dtype = 'bfloat16', but {device} would only emulate it, slower than float32. "
            "Use --train.dtype float32."
        )
    return Precision(compute=wanted, reason="asked for")
