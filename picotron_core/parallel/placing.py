"""Tokens on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device, which nobody waits for.

    A copy of pageable memory may hold the host until the stream has come to it, and before it on
    the stream is, where a rank is lost, a collective that never ends.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
