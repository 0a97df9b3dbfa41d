"""The recipe: from a model of one process to this rank's part of it."""

from __future__ import annotations

import torch

from picotron_core.model.llama import Llama
from picotron_core.parallel.data import Replicas, Weights
from picotron_core.parallel.mesh import Mesh
from picotron_core.parallel.zero1 import Shards
from picotron_core.schema import Parallel

FLOAT32_BYTES = 4


def make_weights(
    model: Llama,
    settings: Parallel,
    mesh: Mesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reduce: torch.dtype = torch.float32,
) -> Weights:
    """Move a float32 model to `device` and `dtype`, and keep the float32 truth behind it.

    Args:
        reduce: what gradients travel in.
    """
    capacity = bucket_capacity(settings)
    if settings.zero and mesh.data.size > 1:
        return Shards(
            model,
            device=device,
            dtype=dtype,
            axis=mesh.data,
            capacity=capacity,
            reads=model.reads(),
            reduce=reduce,
        )
    return Replicas(
        model, device=device, dtype=dtype, axis=mesh.data, capacity=capacity, reduce=reduce
    )


def bucket_capacity(settings: Parallel) -> int:
    """Numbers in a bucket of gradients."""
    return int(settings.bucket_mb * 1e6 / FLOAT32_BYTES)
