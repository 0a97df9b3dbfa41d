"""All that changes while training: what a checkpoint must hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picotron_core.engine.loss_scale import LossScale
from picotron_core.model.llama import Llama
from picotron_core.ops.optimizer import STATES


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The model in its compute dtype, and the float32 truth behind it.

    masters: name -> float32 parameter; the model's own parameters where it computes in float32.
        After backward each master's `.grad` holds the float32 gradient of the loss sum.
    moments: optimizer state name -> parameter name -> float32 tensor.
    step, tokens: done so far.
    loss_scale: where the model computes in float16.
    """

    model: Llama
    masters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    step: int = 0
    tokens: int = 0
    loss_scale: LossScale | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.masters.values())).device

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the model's low-precision weights."""
        parameters: list[Tensor] = [p for p in self.model.parameters() if p.dtype != torch.float32]
        if parameters:
            torch._foreach_copy_(parameters, list(self.masters.values()))

    def drop_gradients(self) -> None:
        for master in self.masters.values():
            master.grad = None


def new_state(model: Llama, *, dtype: torch.dtype, device: torch.device) -> TrainState:
    """A state at step 0 from a float32 model, which is moved to `device` and cast to `dtype`."""
    if dtype == torch.float32:
        model.to(device)
        masters: dict[str, Tensor] = dict(model.named_parameters())
    else:
        masters = {
            name: parameter.detach().to(device, copy=True)
            for name, parameter in model.named_parameters()
        }
        model.to(device, dtype)
        for name, parameter in model.named_parameters():
            _fold_gradients_into(masters[name], parameter)
    moments = {
        state: {name: torch.zeros_like(master) for name, master in masters.items()}
        for state in STATES
    }
    return TrainState(model=model, masters=masters, moments=moments)


def _fold_gradients_into(master: Tensor, parameter: torch.nn.Parameter) -> None:
    """Accumulate over micro-batches in float32: a 16-bit sum would lose the small gradients."""

    def fold(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(fold)  # type: ignore[no-untyped-call]
