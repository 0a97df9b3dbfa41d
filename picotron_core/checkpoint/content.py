"""What a rank writes of a state, and what the manifest says of all ranks' files."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from picotron_core.checkpoint import header
from picotron_core.checkpoint.manifest import Facts, Manifest, Scale
from picotron_core.checkpoint.pieces import degrees_of, held, numbers_of, tensors, written
from picotron_core.checkpoint.rng import rng_states
from picotron_core.engine.state import TrainState


def file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def content(state: TrainState) -> tuple[bytes, list[Tensor]]:
    """This rank's file: its header, and flat views of the numbers that follow, end to end."""
    mine, whole = written(state), held(state)
    kinds = [kind for kind, _ in tensors(state)]
    head = header.encode(mine, kinds, shapes=state.layout.shapes, notes=rng_states(state))
    numbers = [
        numbers_of(of[name], whole[name], piece)
        for _, of in tensors(state)
        for name, piece in mine.items()
    ]
    return head, numbers


def manifest_of(state: TrainState, facts: Facts) -> Manifest:
    """All but the files, which are still to be written."""
    scale = asdict(state.loss_scale) if state.loss_scale else None
    return Manifest(
        step=state.step,
        tokens=state.tokens,
        samples=state.step * facts.global_batch,
        facts=facts,
        layout=degrees_of(state),
        loss_scale=Scale(**{k: scale[k] for k in Scale.model_fields}) if scale else None,
        parameters={name: list(shape) for name, shape in state.layout.shapes.items()},
        kinds=[kind for kind, _ in tensors(state)],
        files={},
    )
