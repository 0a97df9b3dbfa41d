"""The recipe: from a model of one process to this rank's part of it."""

from __future__ import annotations

import torch

from picotron_core.errors import ConfigError
from picotron_core.model.architecture import Architecture
from picotron_core.model.llama import Llama
from picotron_core.parallel.data import Replicas, Weights
from picotron_core.parallel.layout import Layout
from picotron_core.parallel.mesh import Mesh, data_parallel_degree
from picotron_core.parallel.tensor import cuts_of, divide, refuse_tensor_parallel
from picotron_core.parallel.zero1 import Shards
from picotron_core.schema import Parallel

FLOAT32_BYTES = 4


def parallelize(
    model: Llama,
    settings: Parallel,
    mesh: Mesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reduce: torch.dtype = torch.float32,
) -> tuple[Weights, Layout]:
    """Make of a whole float32 model this rank's, on `device` and in `dtype`, with the float32 truth
    behind it.

    Args:
        reduce: what gradients travel in.
    """
    cuts = cuts_of(model, mesh.tp)
    if mesh.tp.size > 1:
        divide(model, cuts, mesh.tp, sequence=settings.sequence)
    weights: Weights
    capacity = bucket_capacity(settings)
    if settings.zero and mesh.data.size > 1:
        weights = Shards(
            model,
            device=device,
            dtype=dtype,
            axis=mesh.data,
            capacity=capacity,
            reads=model.reads(),
            reduce=reduce,
        )
    else:
        weights = Replicas(
            model, device=device, dtype=dtype, axis=mesh.data, capacity=capacity, reduce=reduce
        )
    return weights, Layout(mesh=mesh, cuts=cuts)


def refuse_layout(
    settings: Parallel, architecture: Architecture, *, world_size: int, seq_len: int
) -> int:
    """How many replicas of the model the ranks hold.

    Raises: ConfigError for degrees that this model, or this number of ranks, does not allow.
    """
    refuse_tensor_parallel(architecture, settings.tp)
    if settings.sequence and seq_len % settings.tp:
        raise ConfigError(
            f"parallel.sequence divides each sequence among {settings.tp} ranks, but data.seq_len "
            f"is {seq_len}. Use --data.seq_len {seq_len - seq_len % settings.tp or settings.tp}."
        )
    return data_parallel_degree(world_size, tp=settings.tp)


def bucket_capacity(settings: Parallel) -> int:
    """Numbers in a bucket of gradients."""
    return int(settings.bucket_mb * 1e6 / FLOAT32_BYTES)
