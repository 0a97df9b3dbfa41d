"""The recipe: from a model of one process to this rank's part of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from picotron_core.errors import ConfigError
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import Values
from picotron_core.model.llama import Llama
from picotron_core.parallel.context import divide_context, refuse_context_parallel
from picotron_core.parallel.data import Replicas, Weights
from picotron_core.parallel.flat import Shared
from picotron_core.parallel.layout import Layout, shapes_of
from picotron_core.parallel.mesh import Mesh, data_parallel_degree
from picotron_core.parallel.pipeline import (
    EMBEDDING,
    cut_into_stages,
    order_of,
    owners_of,
    stages_of,
)
from picotron_core.parallel.tensor import (
    cut_matrices,
    cuts_of,
    divide,
    refuse_tensor_parallel,
    whole_of,
)
from picotron_core.parallel.timeline import Span, no_span
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
    values: Values | None = None,
    reduce: torch.dtype = torch.float32,
    span: Span = no_span,
) -> tuple[Weights, Layout]:
    """Make of a whole model this rank's, on `device` and in `dtype`, with the float32 truth behind
    it.

    Args:
        values: what the whole parameters begin with: then the model may be on the meta device, and
            no rank ever holds more than its part and one whole parameter. None is what it holds.
        reduce: what gradients travel in.
        span: told of what the schemes do.
    """
    shapes = shapes_of(model)
    cuts = cuts_of(model, mesh.tp)
    whole = values or dict(model.named_parameters()).__getitem__
    pipeline, owners = None, {}
    shared: list[Shared] = []
    if mesh.pp.size > 1:
        owners = owners_of(model, settings)
        pipeline = cut_into_stages(model, settings, mesh, span=span)
        if model.architecture.tie_word_embeddings:
            shared.append(Shared(axis=mesh.ends, names=[EMBEDDING]))
    if mesh.tp.size > 1:
        cut_matrices(model, cuts)
        divide(model, mesh.tp, sequence=settings.sequence)
        norms = whole_of(model)
        shared.append(Shared(axis=mesh.tp, names=norms, copied=not settings.sequence))
    if mesh.cp.size > 1:
        divide_context(model, mesh.cp, span=span)
    kind = Shards if settings.zero and mesh.data.size > 1 else Replicas
    weights: Weights = kind(
        model,
        device=device,
        dtype=dtype,
        axis=mesh.data,
        values=lambda name: cuts[name].part(whole(name)) if name in cuts else whole(name),
        capacity=bucket_capacity(settings),
        reduce=reduce,
        shared=shared,
    )
    layout = Layout(mesh=mesh, shapes=shapes, cuts=cuts, owners=owners, pipeline=pipeline)
    return weights, layout


def refuse_layout(
    settings: Parallel,
    architecture: Architecture,
    *,
    world_size: int,
    seq_len: int,
    accumulation: int,
) -> int:
    """How many replicas of the model the ranks hold.

    Raises: ConfigError for degrees that this model, or this number of ranks, does not allow.
    """
    refuse_tensor_parallel(architecture, settings.tp)
    refuse_context_parallel(seq_len, settings.cp)
    if settings.sequence and seq_len // settings.cp % settings.tp:
        ranks = settings.cp * settings.tp
        multiple = 2 * ranks if settings.cp > 1 else ranks
        raise ConfigError(
            f"parallel.sequence divides each sequence among {ranks} ranks, but data.seq_len is "
            f"{seq_len}. Use --data.seq_len {seq_len - seq_len % multiple or multiple}."
        )
    if settings.pp > 1:
        stages_of(architecture.num_hidden_layers, settings)
        order_of(settings, stage=0, micro_batches=accumulation)
    return data_parallel_degree(world_size, pp=settings.pp, cp=settings.cp, tp=settings.tp)


def idle_settings(settings: Parallel, *, replicas: int) -> Iterator[str]:
    """What is set, and changes nothing in this layout."""
    defaults = Parallel()
    if settings.zero and replicas * settings.cp == 1:
        yield "parallel.zero = 1 divides the optimizer's state among replicas, and there is one"
    if settings.sequence and settings.tp == 1:
        yield "parallel.sequence divides tokens among the ranks of parallel.tp, which is 1"
    if settings.schedule != defaults.schedule and settings.pp == 1:
        yield f"parallel.schedule = {settings.schedule!r} is for stages, and parallel.pp is 1"
    elif settings.chunks != defaults.chunks and settings.schedule != "interleaved":
        yield f"parallel.chunks = {settings.chunks} is for the interleaved schedule alone"


def bucket_capacity(settings: Parallel) -> int:
    """Numbers in a bucket of gradients."""
    return int(settings.bucket_mb * 1e6 / FLOAT32_BYTES)
