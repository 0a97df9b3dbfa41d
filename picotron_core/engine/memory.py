"""How much memory a training step takes at its worst moment, from the sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from picotron_core.engine.kernel_memory import FLOAT32, INT64, Work, bytes_of, cost
from picotron_core.hardware import Device
from picotron_core.ops.optimizer import STATES
from picotron_core.parallel.zero1 import IN_FLIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What is alive at one point of a step, in bytes."""

    name: str
    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int = 0
    loss: int = 0
    temporary: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


# GiB, and a share of all that comes and goes. The CPU's are from the demo, whose process was within
# 10 % of the sum for micro-batches of 8 to 64 in both dtypes; CUDA's have not been measured.
RESERVE = {"cpu": (0.3, 0.4), "cuda": (0.6, 0.1)}

PARTS = ("weights", "masters", "moments", "gradients", "activations", "loss", "temporary")


def timeline(work: Work) -> list[Moment]:
    """The moments of a step that can be its worst, in their order.

    Activations go as gradients come, both layer by layer, so the sum is greatest at one of the
    ends. With accumulation the earlier micro-batches' gradients are there all the time.
    """
    a, N, size = work.architecture, work.tokens, work.size
    E, P, narrow = a.hidden_size, a.num_parameters, size < FLOAT32
    norm, loss, swiglu, attention = (
        cost(op, work) for op in ("norm", "loss", "swiglu", "attention")
    )
    mlp, layer = norm.kept + swiglu.kept, 2 * norm.kept + attention.kept + swiglu.kept
    batch = 3 * N * INT64
    stream = batch + 2 * N * E * size  # in the backward: the residual stream's gradient, and a sum
    lower = (a.num_hidden_layers - 1) * layer

    head, width = a.vocab_size * E, a.intermediate_size * E  # numbers of such a matrix
    layers = P - head * (1 if a.tie_word_embeddings else 2)
    of_head = 0 if a.tie_word_embeddings else head
    above = of_head + layers - layers // a.num_hidden_layers  # gradients, once at the first layer
    # A tied head's gradient waits for the embedding's. That one is summed in float32, then rounded;
    # a product's gradient is not torch's to add to, so naive-math's is added into a third.
    waiting = head * size if a.tie_word_embeddings else 0
    lookup = head * FLOAT32 + (head * size + N * E * FLOAT32 if narrow else 0)
    if a.tie_word_embeddings and not narrow and work.kernels["loss"] == "naive_math":
        lookup += head * FLOAT32

    share = -(-P // work.shards)

    def moment(
        name: str, *, made: int, activations: int = 0, loss: int = 0, temporary: int = 0
    ) -> Moment:
        return Moment(
            name=name,
            weights=P * size,
            masters=share * FLOAT32 if narrow else 0,
            moments=share * FLOAT32 * len(STATES),
            gradients=FLOAT32 * (P if work.accumulation > 1 else _standing(work, made)),
            activations=activations + (work.in_flight - 1) * a.num_hidden_layers * layer,
            loss=loss,
            temporary=temporary,
        )

    return [
        moment(
            "the loss",
            made=0,
            activations=lower + layer + norm.kept + batch,
            loss=loss.kept,
            temporary=loss.extra,
        ),
        moment(
            "the backward of the last norm",
            made=of_head,
            activations=lower + layer + norm.kept + stream,
            temporary=waiting + norm.extra,
        ),
        moment(
            "the backward of the last layer's MLP",
            made=of_head + width,
            activations=lower + layer + stream,
            temporary=waiting + swiglu.extra,
        ),
        moment(
            "the backward of the last layer's attention",
            made=of_head + 3 * width,
            activations=lower + layer - mlp + stream,
            temporary=waiting + attention.extra,
        ),
        moment(
            "the backward of the first layer's MLP",
            made=above + width,
            activations=layer + stream,
            temporary=waiting + swiglu.extra,
        ),
        moment(
            "the backward of the first layer's attention",
            made=above + 3 * width,
            activations=layer - mlp + stream,
            temporary=waiting + attention.extra,
        ),
        moment(
            "the embedding's gradient",
            made=of_head + layers,
            activations=stream,
            temporary=waiting + lookup,
        ),
        moment(
            "the sum over ranks",
            made=P,
            temporary=_sent(work),
        ),
        replace(
            moment("the update", made=P, temporary=cost("optimizer", work).extra),
            gradients=share * FLOAT32,
        ),
    ]


def _standing(work: Work, made: int) -> int:
    """Of the gradients made so far, those that are there: a sum that is divided leaves a share."""
    if work.shards == 1:
        return made
    return min(made, made // work.shards + (IN_FLIGHT + 1) * _bucket(work))


def _sent(work: Work) -> int:
    """Copies in the dtype that gradients travel in."""
    if work.replicas == 1 or work.reduce_dtype == "float32":
        return 0
    P = work.architecture.num_parameters
    sent = P if work.shards == 1 else min(P, (IN_FLIGHT + 1) * _bucket(work))
    return sent * bytes_of(work.reduce_dtype)


def _bucket(work: Work) -> int:
    """Numbers in the largest bucket: the embedding has one of its own where it is larger."""
    a = work.architecture
    return max(work.bucket, a.vocab_size * a.hidden_size)


def peak(work: Work) -> Moment:
    """The worst moment of a step."""
    return max(timeline(work), key=lambda moment: moment.total)


def reserve(device: Device, moment: Moment) -> int:
    """Bytes that are taken by no tensor: an assumption, where all else is counted.

    What the process or CUDA's context takes, with torch's kernels and cuBLAS's workspace, and the
    gaps that the allocator cannot fill between what comes and goes.
    """
    fixed, gaps = RESERVE["cpu" if device.type == "cpu" else "cuda"]
    passing = moment.gradients + moment.activations + moment.loss + moment.temporary
    return int(fixed * 2**30 + gaps * passing)


def needed(work: Work) -> int:
    """Bytes that the device must have for the run."""
    worst = peak(work)
    return worst.total + reserve(work.device, worst)


def fits(work: Work) -> bool:
    return needed(work) <= work.device.memory_bytes


def largest_micro_batch(work: Work) -> int:
    """The most samples per forward that fit, with the accumulation as it is; 0 where none do."""
    return _last(lambda size: fits(replace(work, micro_batch=size)))


def _last(holds: Callable[[int], bool]) -> int:
    """The largest n >= 1 for which `holds`, which is false from some n on; 0 if there is none."""
    low, high = 0, 1
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
