"""What a rank holds before the first step: its part of the model, and the optimizer's moments."""

from __future__ import annotations

import torch

from picotron_core.engine.loss_scale import LossScale
from picotron_core.engine.state import TrainState, new_state
from picotron_core.engine.trace import Trace
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import Values, drawn
from picotron_core.model.llama import Llama
from picotron_core.model.pretrained import stored_weights
from picotron_core.ops import Ops
from picotron_core.parallel.mesh import Mesh
from picotron_core.parallel.parallelize import parallelize
from picotron_core.parallel.timeline import no_span
from picotron_core.precision import Precision
from picotron_core.schema import Config


def first_state(
    config: Config,
    architecture: Architecture,
    precision: Precision,
    ops: Ops,
    mesh: Mesh,
    device: torch.device,
    trace: Trace | None = None,
    *,
    resumed: bool = False,
) -> TrainState:
    """This rank's part at step 0.

    Args:
        resumed: a checkpoint's numbers are to replace it: no base model is read.
    """
    with torch.device("meta"):  # a rank never holds the whole
        model = Llama(architecture, ops)
    dtype, reduce = getattr(torch, precision.compute), getattr(torch, precision.reduce)
    weights, layout = parallelize(
        model,
        config.parallel,
        mesh,
        device=device,
        dtype=dtype,
        values=_values(config, model, resumed=resumed),
        reduce=reduce,
        span=trace.timeline.span if trace else no_span,
    )
    if trace:
        trace.watch_model(model, mesh, config.parallel)
    seed = config.train.seed + mesh.world.index
    torch.manual_seed(seed)  # a plugin may draw: the same every time
    state = new_state(model, weights, layout)
    state.loss_scale = _loss_scale(config, precision, mesh)
    return state


def _values(config: Config, model: Llama, *, resumed: bool) -> Values:
    """What the whole model's parameters begin with."""
    if not resumed and config.model.path and config.model.pretrained:
        return stored_weights(model, config.model.path, resize=config.model.resize_embeddings)
    return drawn(model, config.train.seed)


def _loss_scale(config: Config, precision: Precision, mesh: Mesh) -> LossScale | None:
    if not precision.scales_loss:
        return None
    train = config.train
    samples = train.micro_batch * train.accumulation * mesh.dp.size
    return LossScale(
        value=train.loss_scale, tokens=samples * config.data.seq_len, growth=train.loss_scale_growth
    )
