"""What the stages of a pipeline have at once, from its schedule alone: for `picotron plan`."""

from __future__ import annotations

from dataclasses import dataclass

from picotron_core.parallel.pipeline import MESSAGES_IN_FLIGHT, order_of, stages_of
from picotron_core.schema import Parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a rank of a pipeline's stage has at once, for counting.

    layers: of the model. embedding, head: whether it has them.
    in_flight: micro-batches whose activations it keeps; of those that are in some of its chunks,
    their part. sent: gradients of hidden states that it keeps until they have arrived; what it
    sends forward is among the activations.
    """

    layers: int
    embedding: bool = True
    head: bool = True
    in_flight: float = 1
    sent: int = 0


def counted_stages(settings: Parallel, layers: int, accumulation: int) -> list[Stage]:
    """Every stage of a pipeline; without one, the whole model."""
    if settings.pp == 1:
        return [Stage(layers=layers)]
    found = []
    for stage, chunks in enumerate(stages_of(layers, settings)):
        first, last = stage == 0, stage == settings.pp - 1
        most = waiting = 0
        for kind, _, _ in order_of(settings, stage=stage, micro_batches=accumulation):
            waiting += 1 if kind == "forward" else -1
            most = max(most, waiting)
        back = len(chunks) * accumulation * (not first)
        found.append(
            Stage(
                layers=sum(map(len, chunks)),
                embedding=first,
                head=last,
                in_flight=most / len(chunks),
                sent=min(MESSAGES_IN_FLIGHT, back),
            )
        )
    return found
