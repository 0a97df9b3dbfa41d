"""Pipeline parallelism: every rank of the pp axis has some of the layers.

A stage gets hidden states from the stage before, computes its layers and passes them on; gradients
come back the same way. Which micro-batch is whose turn is the schedule's to say, in `schedules/`.
Messages are sent without waiting, and received when their turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from picotron_core.errors import ConfigError
from picotron_core.model.llama import Llama
from picotron_core.ops.comm import Work
from picotron_core.parallel.mesh import Axis, Mesh
from picotron_core.parallel.placing import placed
from picotron_core.parallel.schedules import afab, interleaved, one_f_one_b
from picotron_core.parallel.schedules.action import Action
from picotron_core.parallel.timeline import Span, no_span
from picotron_core.schema import Parallel

EMBEDDING = "model.embed_tokens.weight"
# What a stage waits for only later; without, stages could wait in a circle.
MESSAGES_IN_FLIGHT = 2


class MicroBatch(Protocol):
    """What all stages have of a micro-batch; see `picotron_core.data.loader.Batch`."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def doc_ids(self) -> Tensor | None: ...


def chunks_of(layers: int, *, stages: int, chunks: int) -> list[list[range]]:
    """Stage -> its ranges of layers: `chunks` each, of sizes that differ by one at the most.

    The last chunk, which has the head and the loss as well, is never among the longer ones, unless
    all are alike.

    Raises: ConfigError where there are fewer layers than chunks.
    """
    count = stages * chunks
    if layers < count:
        of = f" of {chunks} chunks" if chunks > 1 else ""
        raise ConfigError(
            f"{stages} stages{of} need {count} layers, but the model has {layers}. "
            f"Use --parallel.pp {max(1, layers // chunks)}."
        )
    sizes = [layers // count + (number < layers % count) for number in range(count)]
    starts = [sum(sizes[:number]) for number in range(count)]
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return [ranges[stage::stages] for stage in range(stages)]


def stages_of(layers: int, settings: Parallel) -> list[list[range]]:
    """`chunks_of` by the settings."""
    chunks = settings.chunks if settings.schedule == "interleaved" else 1
    return chunks_of(layers, stages=settings.pp, chunks=chunks)


def owners_of(model: Llama, settings: Parallel) -> dict[str, int]:
    """Parameter of a whole model -> the stage that has it; of a tied embedding, the first."""
    stage = {
        f"model.layers.{layer}.": number
        for number, ranges in enumerate(stages_of(len(model.model.layers), settings))
        for layers in ranges
        for layer in layers
    }
    last = settings.pp - 1
    stage |= {"model.embed_tokens.": 0, "model.norm.": last, "lm_head.": last}
    return {
        name: next(number for prefix, number in stage.items() if name.startswith(prefix))
        for name, _ in model.named_parameters()
    }


def cut_into_stages(
    model: Llama, settings: Parallel, mesh: Mesh, *, span: Span = no_span
) -> Pipeline:
    """Drop from a whole model all that other stages have."""
    ranges = stages_of(len(model.model.layers), settings)[mesh.pp.index]
    model.keep(
        [layer for layers in ranges for layer in layers],
        embedding=mesh.pp.is_first,
        head=mesh.pp.index == mesh.pp.size - 1,
    )
    return Pipeline(
        model=model,
        settings=settings,
        layers=ranges,
        down=mesh.pp,
        up=mesh.back,
        divided=mesh.tp.size if settings.sequence else 1,
        span=span,
    )


def order_of(settings: Parallel, *, stage: int, micro_batches: int) -> list[Action]:
    """The actions of a stage in the schedule of the settings."""
    if settings.schedule == "interleaved":
        return interleaved.order(
            stage=stage, stages=settings.pp, micro_batches=micro_batches, chunks=settings.chunks
        )
    order = afab.order if settings.schedule == "afab" else one_f_one_b.order
    return order(stage=stage, stages=settings.pp, micro_batches=micro_batches)


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """One rank's stage.

    layers: of each of its chunks.
    down, up: the pp axis, by a group for each direction: two ranks may be each other's next.
    divided: by how many a sequence's T is, in what a stage passes on: tp's ranks, or 1.
    span: told of every action, from when its input is there.
    """

    model: Llama
    settings: Parallel
    layers: Sequence[range]
    down: Axis
    up: Axis
    divided: int = 1
    span: Span = no_span

    def is_first(self, chunk: int) -> bool:
        return self.down.is_first and chunk == 0

    def is_last(self, chunk: int) -> bool:
        return self.down.index == self.down.size - 1 and chunk == len(self.layers) - 1

    def train(
        self,
        batches: Sequence[MicroBatch],
        *,
        factor: float,
        expect: Callable[[bool], None],
    ) -> list[Tensor]:
        """Forward and backward of all micro-batches of a step.

        Args:
            factor: on the loss.
            expect: told before a backward whether it is the chunk's last.

        Returns: the losses, on the last stage.
        """
        kept: dict[tuple[int, int], tuple[Tensor | None, Tensor, Sent | None]] = {}
        gradients: deque[Sent] = deque()
        losses = []
        actions = order_of(self.settings, stage=self.down.index, micro_batches=len(batches))
        for kind, number, chunk in actions:
            if kind == "forward":
                hidden, out = self._forward(batches[number], number, chunk)
                sent = None
                if self.is_last(chunk):
                    losses.append(out.detach())
                else:
                    sent = _send(self.down.send_to_next, out.detach())
                kept[number, chunk] = hidden, out, sent
                continue
            hidden, out, sent = kept.pop((number, chunk))
            expect(number == len(batches) - 1)
            gradient = None
            if sent is None:
                out = out * factor
            else:
                gradient = torch.empty_like(out)
                self.up.recv_from_next(gradient)
                sent.work.wait()  # it was received, or there would be no gradient
            with self.span("backward", micro_batch=number, chunk=chunk):
                out.backward(gradient)  # type: ignore[no-untyped-call]
            if hidden is not None:
                assert hidden.grad is not None
                gradients.append(_send(self.up.send_to_previous, hidden.grad))
                _settle(gradients, MESSAGES_IN_FLIGHT)
        _settle(gradients, 0)
        return losses

    def evaluate(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The losses of micro-batches, on the last stage."""
        sent: deque[Sent] = deque()
        losses = []
        for (number, batch), chunk in product(enumerate(batches), range(len(self.layers))):
            _, out = self._forward(batch, number, chunk)
            if self.is_last(chunk):
                losses.append(out)
            else:
                sent.append(_send(self.down.send_to_next, out))
                _settle(sent, MESSAGES_IN_FLIGHT)
        _settle(sent, 0)
        return losses

    def _forward(self, batch: MicroBatch, number: int, chunk: int) -> tuple[Tensor | None, Tensor]:
        """What came in, and what goes out: hidden states or, at the end, the loss."""
        model = self.model
        parameter = next(model.parameters())
        device = parameter.device
        inputs = placed(batch.inputs, device)
        doc_ids = None if batch.doc_ids is None else placed(batch.doc_ids, device)
        hidden = None
        if not self.is_first(chunk):
            B, T = inputs.shape
            shape = (B, T // self.divided, model.architecture.hidden_size)
            hidden = torch.empty(shape, dtype=parameter.dtype, device=device)
            self.down.recv_from_previous(hidden)
            hidden.requires_grad_(torch.is_grad_enabled())
        with self.span("forward", micro_batch=number, chunk=chunk):
            out: Tensor = model(inputs, doc_ids=doc_ids, hidden=hidden, layers=self.layers[chunk])
            if self.is_last(chunk):
                out = model.loss_after(out, placed(batch.targets, device))
        return hidden, out


@dataclass(frozen=True, slots=True)
class Sent:
    """A message under way, and its memory."""

    work: Work
    tensor: Tensor


def _send(send: Callable[[Tensor], Work], tensor: Tensor) -> Sent:
    tensor = tensor.contiguous()
    return Sent(send(tensor), tensor)


def _settle(sent: deque[Sent], left: int) -> None:
    """Wait for the oldest messages: their memory must not pile up."""
    while len(sent) > left:
        oldest = sent.popleft()  # its memory is held until it has arrived
        oldest.work.wait()
