"""Where a number first became too large for its dtype. Run only when a run stops for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from picotron_core.data.loader import Batch
from picotron_core.engine.state import TrainState
from picotron_core.engine.step import batch_loss


def first_overflow(state: TrainState, batches: Iterable[Batch], *, factor: float) -> str:
    """Go through this rank's `batches` again, looking at all that comes out of every module.

    Args:
        factor: on the loss.

    Returns: a sentence about the first infinity or NaN, in the order of computation; "" if there is
        none. The gradients that it makes are dropped.
    """
    found: list[str] = []
    handles = list(_watch(state.model, found))
    state.weights.expect(last=False)  # nothing is to be sent
    try:
        if pipeline := state.layout.pipeline:
            pipeline.train(list(batches), factor=factor, expect=lambda _: None)
            return found[0] if found else ""
        for number, batch in enumerate(batches):
            before = len(found)
            loss = batch_loss(state, batch) * factor
            _look(loss, "the loss", found)
            loss.backward()  # type: ignore[no-untyped-call]
            if found and not before:
                found[0] = f"{found[0]} (micro-batch {number})"
        # All of it, for other ranks may wait in the collectives of a forward or a backward.
        return found[0] if found else ""
    finally:
        for handle in handles:
            handle.remove()
        state.weights.drop_gradients()


def _watch(model: nn.Module, found: list[str]) -> Iterable[RemovableHandle]:
    for name, module in model.named_modules():
        if name:
            yield module.register_forward_hook(_after_forward(name, found))
    for name, parameter in model.named_parameters():
        hook = _gradient_hook(f"the gradient of {name}", found)
        yield parameter.register_hook(hook)  # type: ignore[no-untyped-call]


def _after_forward(name: str, found: list[str]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if not isinstance(tensor, Tensor):
                continue
            _look(tensor, f"the activation that {name} puts out", found)
            if tensor.requires_grad:
                what = f"the gradient of the activation that {name} puts out"
                tensor.register_hook(_gradient_hook(what, found))  # type: ignore[no-untyped-call]

    return hook


def _gradient_hook(what: str, found: list[str]) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        _look(gradient, what, found)

    return hook


def _look(tensor: Tensor, what: str, found: list[str]) -> None:
    if found or bool(torch.isfinite(tensor.detach()).all()):
        return
    dtype = str(tensor.dtype).removeprefix("torch.")
    kind = "NaN" if bool(torch.isnan(tensor.detach()).any()) else f"beyond {dtype}'s range"
    found.append(f"{what} is {kind}")
