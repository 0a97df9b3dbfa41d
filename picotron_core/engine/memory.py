"""How much memory a training step takes at its worst moment, from the sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from picotron_core.engine.kernel_memory import FLOAT32, INT64, Work, bytes_of, cost
from picotron_core.engine.stages import Stage
from picotron_core.hardware import Device
from picotron_core.ops.optimizer import STATES
from picotron_core.parallel.flat import buckets_of
from picotron_core.parallel.parallelize import bucket_capacity
from picotron_core.parallel.zero1 import BUCKETS_IN_FLIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What is alive at one point of a step, in bytes, on a rank of a pipeline's stage."""

    name: str
    stage: int
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
    """The moments of a step that can be its worst, in their order, of every stage of a pipeline."""
    return [
        moment
        for number, stage in enumerate(work.stages)
        for others, gradients in _backlogs(work, stage)
        for moment in _of_stage(work, number, others=others, gradients=gradients)
    ]


def _backlogs(work: Work, stage: Stage) -> list[tuple[float, bool]]:
    """In the worst backwards: how many other micro-batches' activations wait for theirs, and
    whether earlier ones have left their gradients.
    """
    most = stage.in_flight - 1
    if work.accumulation == 1:
        return [(0, False)]
    if stage.in_flight < work.accumulation:
        return [(most, True)]
    return [(most, False), (most - 1, True)]  # all wait for the first; it will not be so again


def _of_stage(work: Work, number: int, *, others: float, gradients: bool) -> Iterator[Moment]:
    """The moments of one micro-batch, see `_backlogs`.

    Activations go as gradients come, both layer by layer, so the sum is greatest at one of the
    ends.
    """
    stage = work.stages[number]
    a, N, size = work.architecture, work.tokens, work.size
    E, L, narrow = a.hidden_size, stage.layers, size < FLOAT32
    norm, loss, swiglu, attention = (
        cost(op, work) for op in ("norm", "loss", "swiglu", "attention")
    )
    hidden = work.tokens_between * E * size
    mlp, layer = norm.kept + swiglu.kept, 2 * norm.kept + attention.kept + swiglu.kept
    batch = 3 * N * INT64
    stream = batch + 2 * hidden  # in the backward: the residual stream's gradient, and a sum
    lower = (L - 1) * layer
    # What a stage passes on and, where its first norm keeps a copy instead, what came.
    passed = hidden * ((not stage.head) + (narrow and not stage.embedding))
    # Other schedules go back from a loss at once.
    losses = stage.head and work.parallel.schedule == "afab"
    at_the_end = norm.kept + loss.kept if losses else 0
    waiting = int(others * (L * layer + passed + at_the_end)) + stage.sent * hidden

    head, width = a.vocab_size * E, a.intermediate_size * E  # numbers of such a matrix
    tied = a.tie_word_embeddings and stage.embedding and stage.head
    sizes = _sizes(work, stage)
    buckets = [bucket.size for bucket in buckets_of(sizes, capacity=bucket_capacity(work.parallel))]
    P, layers = sum(sizes.values()), sum(size for name, size in sizes.items() if "layer" in name)
    of_head = head if stage.head and not tied else 0
    above = of_head + layers - layers // L  # gradients, once at the first layer
    # A tied head's gradient is kept for the embedding's. That one is summed in float32, then
    # rounded; a product's gradient is not torch's to add to: naive-math's is added into a third.
    kept = head * size if tied else 0
    lookup = head * FLOAT32 + (head * size + N * E * FLOAT32 if narrow else 0)
    if tied and not narrow and work.kernels["loss"] == "naive_math":
        lookup += head * FLOAT32

    share = -(-P // work.shards)

    def moment(
        name: str, *, made: int, activations: int = 0, loss: int = 0, temporary: int = 0
    ) -> Moment:
        return Moment(
            name=name,
            stage=number,
            weights=P * size,
            masters=share * FLOAT32 if narrow else 0,
            moments=share * FLOAT32 * len(STATES),
            gradients=_standing(work, buckets, made, before=gradients),
            activations=activations + passed + waiting,
            loss=loss,
            temporary=temporary,
        )

    if stage.head:
        yield moment(
            "the loss",
            made=0,
            activations=lower + layer + norm.kept + batch,
            loss=loss.kept,
            temporary=loss.extra,
        )
        yield moment(
            "the backward of the last norm",
            made=of_head,
            activations=lower + layer + norm.kept + stream,
            temporary=kept + norm.extra,
        )
    yield moment(
        "the backward of the last layer's MLP",
        made=of_head + width,
        activations=lower + layer + stream,
        temporary=kept + swiglu.extra,
    )
    yield moment(
        "the backward of the last layer's attention",
        made=of_head + 3 * width,
        activations=lower + layer - mlp + stream,
        temporary=kept + attention.extra,
    )
    yield moment(
        "the backward of the first layer's MLP",
        made=above + width,
        activations=layer + stream,
        temporary=kept + swiglu.extra,
    )
    yield moment(
        "the backward of the first layer's attention",
        made=above + 3 * width,
        activations=layer - mlp + stream,
        temporary=kept + attention.extra,
    )
    if stage.embedding:
        yield moment(
            "the embedding's gradient",
            made=of_head + layers,
            activations=stream,
            temporary=kept + lookup,
        )
    yield replace(
        moment("the sum over ranks", made=P, temporary=_sent(work, buckets)), activations=0
    )
    yield replace(
        moment("the update", made=P, temporary=cost("optimizer", work).extra),
        gradients=share * FLOAT32,
        activations=0,
    )


def _sizes(work: Work, stage: Stage) -> dict[str, int]:
    """Numbers in each parameter of a rank, in the order of `sizes_in_order`."""
    a = work.architecture
    E, D, head = a.hidden_size, a.head_dim, a.vocab_size * a.hidden_size
    queries, keys = (E * D * heads for heads in (a.num_attention_heads, a.num_key_value_heads))
    width = E * a.intermediate_size
    layer = {"input_norm": E, "q": queries, "k": keys, "v": keys, "o": queries}
    layer |= {"norm": E, "gate": width, "up": width, "down": width}
    tied = a.tie_word_embeddings
    sizes = {"embedding": head} if stage.embedding or (tied and stage.head) else {}
    for number in range(stage.layers):
        sizes |= {f"layer {number} {name}": size for name, size in layer.items()}
    if stage.head:
        sizes |= {"norm": E} | ({} if tied else {"head": head})
    return sizes


def _standing(work: Work, buckets: Sequence[int], made: int, *, before: bool) -> int:
    """Bytes of gradients: of the micro-batches before, if any, and of this one's made so far, from
    the last parameter on. A sum that is divided leaves a share of them, the buckets that are on
    their way, and the one that is being filled, or is full and not sent yet.
    """
    P = sum(buckets)
    if work.shards == 1 or (work.accumulation > 1 and not before):  # or not to be sent so soon
        return (P if before else made) * FLOAT32
    full = [size for size, end in zip(buckets, accumulate(buckets), strict=True) if end <= made]
    later = P - sum(full) if before else 0
    filled = buckets[len(full)] if made > sum(full) and not before else 0  # for all that will come
    number = bytes_of(work.reduce_dtype) * (2 if work.on_cpu else 1)  # gloo-cpu's: others' slices
    sent = FLOAT32 * filled + number * sum(full[-BUCKETS_IN_FLIGHT:])
    unsent = FLOAT32 * sum(full[-1:]) + number * sum(full[-BUCKETS_IN_FLIGHT - 1 : -1])
    held = FLOAT32 * (later + sum(full) // work.shards) + max(sent, unsent)
    return max(held, P * FLOAT32) if before else held


def _sent(work: Work, buckets: Sequence[int]) -> int:
    """The largest bucket in the dtype that gradients travel in, beside the same in float32."""
    if work.replicas == 1 or work.reduce_dtype == "float32":
        return 0
    return bytes_of(work.reduce_dtype) * max(buckets)


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
