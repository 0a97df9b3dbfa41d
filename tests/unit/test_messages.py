"""What ranks send to each other in a pipeline or a ring, over communicators that wait in turn.

A communicator of NCCL does one thing after the other on each rank: a message that is sent holds up
all that the rank asks for later, until it is received. Each rank runs alone, over a `comm` that
notes what it is asked for; then all of them are played together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from picotron_core.data.loader import Batch
from picotron_core.parallel.context import ring
from picotron_core.parallel.mesh import make_mesh
from picotron_core.parallel.pipeline import Pipeline
from picotron_core.schema import Parallel

LAYOUTS = [
    *((name, stages, m, 1) for name in ("afab", "1f1b") for stages in (2, 3, 4) for m in (1, 3, 8)),
    *(("interleaved", p, rounds * p, v) for p in (2, 3, 4, 5) for rounds in (1, 3) for v in (2, 3)),
]


@dataclass(frozen=True)
class Said:
    """kind: send or recv, which are numbered from each rank to each other; or wait, for either."""

    kind: str
    source: int
    target: int
    group: int
    number: int

    @property
    def message(self) -> tuple[int, ...]:
        return self.source, self.target, self.group, self.number


@dataclass
class UnderWay:
    said: Said
    all: list[Said]

    def wait(self) -> None:
        self.all.append(replace(self.said, kind="wait"))


@dataclass
class Notes:
    """A `comm` of one rank that notes its messages, and delivers nothing."""

    rank: int
    said: list[Said] = field(default_factory=list)
    groups: int = 0

    def new_group(self, ranks):
        self.groups += 1
        return self.groups

    def send(self, tensor, *, dst, group, async_op):
        return self._note("send", self.rank, dst, group)

    def recv(self, tensor, *, src, group, async_op=False):
        work = self._note("recv", src, self.rank, group)
        if not async_op:
            work.wait()
        return work

    def _note(self, kind, source, target, group):
        before = [s for s in self.said if (s.kind, *s.message[:3]) == (kind, source, target, group)]
        self.said.append(Said(kind, source, target, group, len(before)))
        return UnderWay(self.said[-1], self.said)


class Line(nn.Module):
    """A model of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.architecture = SimpleNamespace(hidden_size=1)

    def forward(self, inputs: Tensor, *, doc_ids, hidden, layers) -> Tensor:
        x = inputs[..., None].float() if hidden is None else hidden
        return x * self.weight

    def loss_after(self, out: Tensor, _: Tensor) -> Tensor:
        return out.sum()


@cache
def said(schedule: str, stages: int, micro_batches: int, chunks: int, training: bool):
    """What each stage says in a step, or in an evaluation."""
    every = []
    ids = torch.zeros(1, 1, dtype=torch.int64)
    batches = [Batch(inputs=ids, targets=ids, doc_ids=None)] * micro_batches
    for rank in range(stages):
        comm = Notes(rank)
        mesh = make_mesh(comm, rank=rank, world_size=stages, pp=stages)
        stage = Pipeline(
            model=Line(),
            settings=Parallel(pp=stages, schedule=schedule, chunks=chunks),
            layers=[range(1)] * chunks,
            down=mesh.pp,
            up=mesh.back,
        )
        if training:
            stage.train(batches, factor=1.0, expect=lambda last: None)
        else:
            with torch.no_grad():
                stage.evaluate(batches)
        every.append(comm.said)
    return every


def stuck(every: list[list[Said]]) -> list[Said]:
    """What the ranks wait for when nothing goes on any more; nothing where all come to their end.

    A rank stays at a `wait` until its message is delivered: once both ranks have come to it, and it
    is the first in the queues that both have for its communicator.
    """
    queues = [
        {g: [s for s in said if s.group == g and s.kind != "wait"] for g in {s.group for s in said}}
        for said in every
    ]
    at, delivered, moving = [0] * len(every), set(), True
    while moving:
        moving = False
        for rank, plan in enumerate(every):
            while at[rank] < len(plan) and (
                plan[at[rank]].kind != "wait" or plan[at[rank]].message in delivered
            ):
                at[rank] += 1
                moving = True
            for queue in queues[rank].values():
                if queue and queue[0].kind == "send" and queue[0] in plan[: at[rank]]:
                    there = queues[queue[0].target].get(queue[0].group)
                    come_to = every[queue[0].target][: at[queue[0].target]]
                    if there and there[0] == replace(queue[0], kind="recv") and there[0] in come_to:
                        delivered.add(queue.pop(0).message)
                        there.pop(0)
                        moving = True
    return [plan[place] for plan, place in zip(every, at, strict=True) if place < len(plan)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_no_stage_waits_for_ever(layout, training):
    assert stuck(said(*layout, training)) == []


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_no_rank_of_a_ring_waits_for_ever(ranks):
    every = rings(ranks)
    assert stuck(every) == []
    for plan in every:  # keys forward, keys backward, and their gradients all the way home
        kinds = [said.kind for said in plan]
        assert kinds.count("send") == kinds.count("recv") == 2 * (2 * (ranks - 1) + ranks)


@cache
def rings(ranks: int) -> list[list[Said]]:
    """What each rank of a ring says in the forward and the backward of two layers."""
    every = []
    for rank in range(ranks):
        comm = Notes(rank)
        around = ring(attention, make_mesh(comm, rank=rank, world_size=ranks, cp=ranks).cp)
        q = torch.zeros(1, 1, 2, 1, requires_grad=True)
        around(around(q, q, q, causal=True), q, q, causal=True).sum().backward()
        every.append(comm.said)
    return every


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal, scale, return_lse) -> tuple[Tensor, ...]:
    logits = q @ k.mT
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def test_one_communicator_for_each_direction_would_be_too_few():
    """Where each rank sends before it receives, around a ring, nobody receives."""
    mesh = make_mesh(Notes(0), rank=0, world_size=2, pp=2)
    one = {lane: axis.lanes[0] for axis in (mesh.pp, mesh.back) for lane in axis.lanes}
    assert len(one) == 4
    for plans in (said("interleaved", 2, 4, 2, True), rings(2)):
        assert stuck([[replace(s, group=one[s.group]) for s in plan] for plan in plans])


def test_what_is_sent_is_kept_no_longer_than_needed():
    """A stage's messages hold no more memory than the activations that 1F1B keeps, and some."""
    stages = 4
    for stage, plan in enumerate(said("1f1b", stages, 12, 1, True)):
        held, most = set(), 0
        for action in plan:
            if action.kind == "send":
                held.add(action.message)
            held -= {action.message} if action.kind == "wait" else set()
            most = max(most, len(held))
        assert not held
        forwards = stages - stage if stage < stages - 1 else 0
        gradients = 3 if stage else 0  # a third until it is seen that there are too many
        assert most <= forwards + gradients, (stage, most)
