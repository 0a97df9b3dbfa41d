"""What is on its way is left alone until it is waited for, and is on its way while ranks compute.

Training over a `comm` that is as late as a transport may be comes to the bits of training over one
that does everything at once. Nothing here looks at a clock: what overlaps is told by the order in
which a rank asks, computes and waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from late import LateComm, among_threads
from torch import Tensor

from picotron_core.config import parse_backends
from picotron_core.data.loader import Batch
from picotron_core.engine.state import TrainState, new_state
from picotron_core.engine.step import evaluate, part_of, train_step
from picotron_core.hardware import look
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import drawn
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.ops import Ops
from picotron_core.parallel.context import ring
from picotron_core.parallel.mesh import Mesh, make_mesh
from picotron_core.parallel.parallelize import parallelize
from picotron_core.parallel.zero1 import BUCKETS_IN_FLIGHT
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.schema import Parallel, Train

LAYERS, B, T = 4, 2, 16
MODEL = Architecture(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=31,
    tie_word_embeddings=True,
    initializer_range=0.2,
)


@cache
def kernels(dtype: str, context: int) -> Ops:
    wanted = requests(
        MODEL,
        device=look("cpu"),
        dtype=dtype,
        seq_len=T,
        context=context,
        micro_batch=B,
        document_mask=False,
        training=True,
        world_size=1,
    )
    chosen = resolve(parse_backends("naive-math", "test"), wanted, load_registry().candidates)
    return Ops(**{op: selection.chosen.backend.load() for op, selection in chosen.items()})


def parallel_state(
    comm: LateComm, parallel: dict[str, Any], dtype: str
) -> tuple[TrainState, Ops, Mesh]:
    """Of a rank, in buckets of 500 numbers: two dozen of them."""
    settings = Parallel.model_validate({"bucket_mb": 0.002, **parallel})
    degrees = {"pp": settings.pp, "cp": settings.cp, "tp": settings.tp}
    mesh = make_mesh(comm, rank=comm.rank, world_size=comm.size, **degrees)
    ops = replace(kernels(dtype, settings.cp), comm=comm)
    with torch.device("meta"):
        model = Llama(MODEL, ops)
    weights, layout = parallelize(
        model,
        settings,
        mesh,
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
        values=drawn(model, 0),
    )
    return new_state(model, weights, layout), ops, mesh


def batches_of(step: int, mesh: Mesh) -> list[Batch]:
    generator = torch.Generator().manual_seed(10 * step + mesh.dp.index)
    ids = torch.randint(0, MODEL.vocab_size, (2 * mesh.pp.size, B, T + 1), generator=generator)
    wholes = [Batch(inputs=i[:, :-1], targets=i[:, 1:], doc_ids=None) for i in ids]
    return [part_of(whole, mesh.cp) for whole in wholes]


LAYOUTS = [
    (2, {}),
    (2, {"zero": 1}),
    (4, {"zero": 1}),
    (2, {"cp": 2}),
    (4, {"cp": 4, "zero": 1}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "schedule": "interleaved"}),
    (4, {"pp": 2, "zero": 1}),
    (2, {"tp": 2}),
    (4, {"tp": 2, "sequence": True, "zero": 1}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS, ids=str)
def test_nobody_touches_what_is_on_its_way(ranks, parallel, dtype):
    def train(comm: LateComm) -> tuple[list[float], dict[str, Tensor]]:
        state, ops, mesh = parallel_state(comm, parallel, dtype)
        losses = [
            train_step(state, batches_of(step, mesh), ops, lr=1e-2, train=Train()).loss
            for step in range(3)
        ]
        losses.append(evaluate(state, batches_of(3, mesh)))
        state.weights.wait()
        return losses, state.masters

    late, at_once = (among_threads(ranks, train, late=late) for late in (True, False))
    for (losses, masters), (wanted_losses, wanted) in zip(late, at_once, strict=True):
        assert losses == wanted_losses
        assert len(set(losses)) == len(losses)
        assert masters.keys() == wanted.keys()
        for name, master in masters.items():
            assert torch.equal(master, wanted[name]), name


def watched(zero: int) -> list[tuple[list[tuple[Any, ...]], TrainState]]:
    """Two steps of two ranks: what each did, in its order, and its state.

    Besides what is asked and waited for, that is ("begun" or "ended", phase, micro_batch),
    ("gradient", parameter) and ("forward", module).
    """

    def train(comm: LateComm) -> tuple[list[tuple[Any, ...]], TrainState]:
        state, ops, mesh = parallel_state(comm, {"zero": zero}, "bfloat16")

        @contextmanager
        def span(name: str, micro_batch: int | None = None) -> Iterator[None]:
            comm.events.append(("begun", name, micro_batch))
            yield
            comm.events.append(("ended", name, micro_batch))

        def noting(*event: Any) -> Callable[..., None]:
            return lambda *_: comm.events.append(event)

        for name, parameter in state.model.named_parameters():
            parameter.register_hook(noting("gradient", name))
        for module in state.model.reads():
            module.register_forward_pre_hook(noting("forward", module))
        for step in range(2):
            train_step(state, batches_of(step, mesh), ops, lr=1e-2, train=Train(), span=span)
        state.weights.wait()
        return comm.events, state

    return among_threads(2, train)


def last_backward(events: list[tuple[Any, ...]]) -> tuple[int, int]:
    """Where that of the first step begins and ends."""
    begun, ended = ((edge, "backward", 1) for edge in ("begun", "ended"))
    return events.index(begun), events.index(ended)


@pytest.mark.parametrize(("zero", "op"), [(0, "all_reduce"), (1, "reduce_scatter")])
def test_a_bucket_is_on_its_way_while_backward_computes_the_next(zero, op):
    for events, state in watched(zero):
        begun, ended = last_backward(events)
        assert {event[0] for event in events[:begun]} == {"begun", "ended", "forward", "gradient"}
        numbers = range(len(state.weights.buckets))
        assert len(numbers) > 20
        asked = [events.index(("asked", op, number), begun, ended) for number in numbers]
        for layer in range(LAYERS - 1):
            behind = [f"model.layers.{n}." for n in range(layer + 1, LAYERS)] + ["model.norm."]
            complete = [
                number
                for number, bucket in enumerate(state.weights.buckets)
                if all(name.startswith(tuple(behind)) for name in bucket.spans)
            ]
            come_to = min(
                events.index(("gradient", name), begun)
                for name, _ in state.model.named_parameters()
                if name.startswith(f"model.layers.{layer}.")
            )
            assert complete
            assert max(asked[number] for number in complete) < come_to


def test_replicas_wait_for_no_bucket_before_backward_is_over():
    for events, state in watched(0):
        _, ended = last_backward(events)
        assert not [event for event in events[:ended] if event[0] == "waited"]
        waited = [event[2] for event in events[ended:] if event[:2] == ("waited", "all_reduce")]
        numbers = list(range(len(state.weights.buckets)))
        assert waited == numbers + [len(numbers) + number for number in numbers]  # of two steps


def test_few_buckets_are_on_their_way_at_once_where_ranks_keep_a_part_of_each():
    for events, state in watched(1):
        kinds = [event[0] for event in events if event[1] == "reduce_scatter"]
        under_way = list(accumulate(1 if kind == "asked" else -1 for kind in kinds))
        assert max(under_way) == BUCKETS_IN_FLIGHT
        assert kinds.count("asked") == 2 * len(state.weights.buckets)


def test_each_module_waits_for_its_own_weights_alone():
    for events, state in watched(1):
        buckets = state.weights.buckets
        begun, ended = (events.index((edge, "optimizer", None)) for edge in ("begun", "ended"))
        # All are asked for, as forward needs them, the last bucket first, and none is waited for.
        gathers = [("asked", "all_gather", number) for number in range(len(buckets))]
        assert [event for event in events[begun:ended] if event[1] == "all_gather"] == gathers
        needed: set[int] = set()
        for module, names in state.model.reads().items():
            needed |= {
                len(buckets) - 1 - number
                for number, bucket in enumerate(buckets)
                if bucket.spans.keys() & set(names)
            }
            called = events.index(("forward", module), ended)
            waited = [event for event in events[ended:called] if event[0] == "waited"]
            assert {event[2] for event in waited if event[1] == "all_gather"} == needed
        assert len(needed) == len(buckets) > 20


def on_the_way_round(ranks: int) -> list[dict[str, list[int]]]:
    """Forward and backward of a ring: how many messages were coming to a rank at each of its
    attentions.
    """

    def rank(comm: LateComm) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"forward": [], "backward": []}
        cp = make_mesh(comm, rank=comm.rank, world_size=ranks, cp=ranks).cp

        def attention(*args: Tensor, **more: Any) -> Any:
            kind = "backward" if torch.is_grad_enabled() else "forward"
            found[kind].append([asked.name[0] for asked in comm.open].count("recv"))
            return kernels("float32", ranks).attention(*args, **more)

        generator = torch.Generator().manual_seed(comm.rank)
        q, k, v = (torch.randn(1, 2, 6, 4, generator=generator).requires_grad_() for _ in range(3))
        ring(attention, cp)(q, k, v, causal=True).sum().backward()
        return found

    return among_threads(ranks, rank)


def test_the_next_keys_come_while_attention_looks_at_those_at_hand():
    for rank in on_the_way_round(4):
        assert rank["forward"] == [1, 1, 1, 0]
        # and the gradients of the keys before, from the second turn on
        assert rank["backward"] == [1, 2, 2, 1]
