"""Where a number first became too large for its dtype. Run only when a run stops for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from picotron_core.data.loader import Batch
from picotron_core.engine.state import TrainState
from picotron_core.engine.step import batch_loss

GRADIENT = "the gradient of "


def first_overflow(state: TrainState, batches: Iterable[Batch], *, factor: float) -> str:
    """Go through this rank's `batches` again, looking at all that comes out of every module.

    Args:
        factor: on the loss.

    Returns: a sentence about the first infinity or NaN, in the order of computation; "" if there is
        none. The gradients that it makes are dropped.
    """
    search = Search()
    handles = list(_watch(state.model, search))
    state.weights.expect(last=False)  # nothing is to be sent
    try:
        # All of it, for other ranks may wait in the collectives of a forward or a backward.
        if pipeline := state.layout.pipeline:
            former, pipeline.span = pipeline.span, search.within
            try:
                pipeline.train(list(batches), factor=factor, expect=lambda _: None)
            finally:
                pipeline.span = former
        else:
            for number, batch in enumerate(batches):
                with search.within("step", micro_batch=number):
                    loss = batch_loss(state, batch) * factor
                    search.look(loss, "the loss")
                    loss.backward()  # type: ignore[no-untyped-call]
        return search.found
    finally:
        for handle in handles:
            handle.remove()
        state.weights.drop_gradients()


def where_it_began(told: Sequence[str]) -> str:
    """Of what the ranks found, by their order, a sentence about the first; "" if that is nothing.

    What is too large goes down the stages of a pipeline in forward, and up in backward.
    """
    forward = [(rank, text) for rank, text in enumerate(told) if not text.startswith(GRADIENT)]
    backward = [(rank, text) for rank, text in enumerate(told) if text.startswith(GRADIENT)]
    ordered = [*forward, *reversed(backward)]
    return next((f" On rank {rank} {text}." for rank, text in ordered if text), "")


@dataclass(slots=True)
class Search:
    """found: what was too large first."""

    found: str = ""
    _micro_batch: int | str = 0

    @contextmanager
    def within(self, _: str, /, **facts: int | str) -> Iterator[None]:
        """A `Span`: what is seen in it is of its micro-batch."""
        self._micro_batch = facts["micro_batch"]
        yield

    def look(self, tensor: Tensor, what: str) -> None:
        if self.found or bool(torch.isfinite(tensor.detach()).all()):
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        kind = "NaN" if bool(torch.isnan(tensor.detach()).any()) else f"beyond {dtype}'s range"
        self.found = f"{what} is {kind} (micro-batch {self._micro_batch})"


def _watch(model: nn.Module, search: Search) -> Iterable[RemovableHandle]:
    for name, module in model.named_modules():
        if name:
            yield module.register_forward_hook(_after_forward(name, search))
    for name, parameter in model.named_parameters():
        hook = _gradient_hook(name, search)
        yield parameter.register_hook(hook)  # type: ignore[no-untyped-call]


def _after_forward(name: str, search: Search) -> Callable[..., None]:
    what = f"the activation that {name} puts out"

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if not isinstance(tensor, Tensor):
                continue
            search.look(tensor, what)
            if tensor.requires_grad:
                tensor.register_hook(_gradient_hook(what, search))  # type: ignore[no-untyped-call]

    return hook


def _gradient_hook(what: str, search: Search) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        search.look(gradient, f"{GRADIENT}{what}")

    return hook
