"""What the comm kernels share: a finished work, and the check of sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from picotron_core.ops.comm import ReduceOp


@dataclass(frozen=True, slots=True)
class Done:
    """The work of a collective that has already happened."""

    def wait(self) -> None:
        return None


def check_op(op: str) -> None:
    """Raises: ValueError for a reduction that is not in the contract, such as an average."""
    if op not in get_args(ReduceOp):
        raise ValueError(f"comm reduces by {', '.join(get_args(ReduceOp))}, not by {op!r}")


def check_shards(whole: Tensor, shard: Tensor, world: int) -> None:
    """`whole` is `world` tensors of `shard`'s size and dtype. Backends differ in whether they ask.

    Raises: ValueError.
    """
    if whole.dtype != shard.dtype:
        raise ValueError(f"dtypes differ: {whole.dtype} for the whole, {shard.dtype} for a shard")
    if whole.numel() != world * shard.numel():
        raise ValueError(
            f"a whole of {whole.numel()} elements is not {world} shards of {shard.numel()}"
        )
