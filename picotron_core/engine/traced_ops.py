"""Kernels whose calls are events of a timeline. A run that is not traced has none of this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from picotron_core.model.llama import Llama
from picotron_core.ops import OPS, Ops
from picotron_core.parallel.timeline import Event, Timeline
from picotron_core.parallel.traffic import NotedComm

Kernel = Callable[..., Any]


def traced_ops(ops: Ops, timeline: Timeline) -> Ops:
    """The same kernels, each inside a wrapper that notes its forwards and backwards."""
    kernels: dict[str, Any] = {
        op: TracedOp(op, getattr(ops, op), timeline) for op in OPS if op != "comm"
    }
    comm = NotedComm(ops.comm, on=False, now=timeline.now, facts=timeline.facts)
    return replace(ops, **kernels, comm=comm)


def trace_layers(model: Llama, timeline: Timeline) -> None:
    """Note each layer's forward, so that an op knows its layer; and a loss that is the layout's."""
    for number, layer in model.model.layers.items():
        _note_forward(layer, int(number), timeline)
    if not isinstance(model.loss_of, TracedOp):  # that of a divided vocabulary is no backend's
        model.loss_of = TracedOp("loss", model.loss_of, timeline)


def _note_forward(layer: nn.Module, number: int, timeline: Timeline) -> None:
    entered: list[Event] = []

    def enter(*_: object) -> None:
        if timeline.on:
            entered.append(timeline.begin("layer", kind="phase", facts={"layer": number}))

    def leave(*_: object) -> None:
        if entered:
            timeline.end(entered.pop())

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)


@dataclass(frozen=True, slots=True)
class TracedOp:
    """Calls `kernel`, and notes when it begins and ends, in forward and in backward.

    Its backward lasts from the first to the last of the nodes that it added to autograd's graph:
    autograd takes the newest node that can go, so no other comes in between. Hooks look on. Nodes
    of one's own, put around the kernel, would change the order of sums, and so their last digits.
    """

    op: str
    kernel: Kernel
    timeline: Timeline

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.timeline.on:
            return self.kernel(*args, **kwargs)
        event = self.timeline.begin(self.op, kind="op", facts={})
        outputs = self.kernel(*args, **kwargs)
        self.timeline.end(event)
        self._follow(_nodes_between(outputs, (*args, *kwargs.values())), event)
        return outputs

    def _follow(self, nodes: list[Node], forward: Event) -> None:
        begun: list[Event] = []
        missing = len(nodes)

        def begin(*_: object) -> None:
            if not begun:
                facts = forward.facts | {"direction": "backward"}
                begun.append(self.timeline.begin(self.op, kind="op", facts=facts))

        def end(*_: object) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                self.timeline.end(begun[0])

        for node in nodes:
            node.register_prehook(begin)
            node.register_hook(end)


def _nodes_between(outputs: Any, inputs: Sequence[Any]) -> list[Node]:
    """What autograd will go through from an op's outputs before it is at its inputs."""
    seen = {x.grad_fn for x in inputs if isinstance(x, Tensor)}
    given = outputs if isinstance(outputs, tuple) else (outputs,)
    ahead = [out.grad_fn for out in given if isinstance(out, Tensor)]
    found = []
    while ahead:
        node = ahead.pop()
        if node is None or node in seen or hasattr(node, "variable"):  # of a leaf
            continue
        seen.add(node)
        found.append(node)
        ahead += [following for following, _ in node.next_functions]
    return found
