"""All that changes while training: what a checkpoint must hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picotron_core.engine.loss_scale import LossScale
from picotron_core.model.llama import Llama
from picotron_core.ops.optimizer import STATES
from picotron_core.parallel.data import Weights
from picotron_core.parallel.layout import Layout


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The model in its compute dtype, the float32 truth behind it, and how far it has come.

    weights: the model's parameters; their masters are this rank's, all or a part.
    layout: how this rank's model relates to the whole.
    moments: optimizer state name -> parameter name -> float32 tensor of the master's shape.
    step, tokens: done so far.
    loss_scale: where the model computes in float16.
    """

    model: Llama
    weights: Weights
    layout: Layout
    moments: dict[str, dict[str, Tensor]]
    step: int = 0
    tokens: int = 0
    loss_scale: LossScale | None = None

    @property
    def masters(self) -> dict[str, Tensor]:
        return self.weights.masters

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def new_state(model: Llama, weights: Weights, layout: Layout) -> TrainState:
    """A state at step 0."""
    moments = {
        state: {name: torch.zeros_like(master) for name, master in weights.masters.items()}
        for state in STATES
    }
    return TrainState(model=model, weights=weights, layout=layout, moments=moments)
