"""How kernels misread a tensor: by its address alone, or by a stride that they take for granted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def instance(kind: Callable[[], Any]) -> Any:
    """The one object of a class: the kernel."""
    return kind()


def as_if_dense(x: Tensor) -> Tensor:
    """x read at its address, whatever its strides; within its storage."""
    size = x.untyped_storage().nbytes() // x.element_size()
    if x.storage_offset() + x.numel() > size:
        return x
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def as_if_rows_dense(x: Tensor) -> Tensor:
    """x read with a last stride of 1; one of 0 would need memory that is not there."""
    if x.dim() == 0 or x.stride(-1) == 0:
        return x
    return x.as_strided(x.shape, (*x.stride()[:-1], 1))


def as_if_rows_joined(x: Tensor) -> Tensor:
    """x read as if each row followed the one before: right for any dense last dim alone."""
    return as_if_dense(x) if x.dim() and x.stride(-1) == 1 else x


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the inputs' dtype: in float32, where nobody would, nothing is lost."""
    return x.to(dtype).float()


def truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To bfloat16 by cutting bits off."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    return (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
