"""Pipeline schedules, played on paper: complete, without a deadlock, and as idle as they say."""

from __future__ import annotations

import pytest

from picotron_core.errors import ConfigError
from picotron_core.parallel.pipeline import chunks_of
from picotron_core.parallel.schedules import afab, interleaved, one_f_one_b
from picotron_core.parallel.schedules.action import Action

ORDERS = {"afab": afab.order, "1f1b": one_f_one_b.order, "interleaved": interleaved.order}


def actions(name: str, stage: int, stages: int, micro_batches: int, chunks: int) -> list[Action]:
    more = {"chunks": chunks} if name == "interleaved" else {}
    return ORDERS[name](stage=stage, stages=stages, micro_batches=micro_batches, **more)


def play(name: str, stages: int, micro_batches: int, chunks: int = 1) -> tuple[int, list[int]]:
    """Every stage does its next action as soon as what it needs is there; a backward takes as long
    as a forward. Returns the turns that it took, and the most that each stage had to keep.
    """
    left = [actions(name, stage, stages, micro_batches, chunks) for stage in range(stages)]
    done: dict[tuple[str, int, int], int] = {}  # kind, micro-batch, place in the model -> turn
    kept, most, turn, last = [0] * stages, [0] * stages, 0, stages * chunks - 1
    while any(left):
        turn += 1
        moved = False
        for stage in range(stages):
            if not left[stage]:
                continue
            kind, number, chunk = left[stage][0]
            place = chunk * stages + stage
            if kind == "forward":
                needed = ("forward", number, place - 1) if place else None
            else:
                needed = ("backward", number, place + 1)
                needed = ("forward", number, place) if place == last else needed
            if needed is None or done.get(needed, turn) < turn:
                left[stage].pop(0)
                done[kind, number, place] = turn
                kept[stage] += 1 if kind == "forward" else -1
                most[stage] = max(most[stage], kept[stage])
                moved = True
        assert moved, f"a deadlock in turn {turn}: {left}"
    assert len(done) == 2 * micro_batches * stages * chunks
    return turn, most


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 12])
def test_all_is_done_in_the_time_that_is_promised(stages, micro_batches):
    turns, most = play("afab", stages, micro_batches)
    assert turns == 2 * (micro_batches + stages - 1)
    assert most == [micro_batches] * stages
    turns, most = play("1f1b", stages, micro_batches)
    assert turns == 2 * (micro_batches + stages - 1)
    assert most == [min(stages - stage, micro_batches) for stage in range(stages)]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_interleaving_shortens_the_wait(stages, chunks, rounds):
    micro_batches = rounds * stages
    turns, _ = play("interleaved", stages, micro_batches, chunks)
    # A turn is one chunk: the idle turns are as many as of 1F1B, but each is 1/v as long.
    assert turns == 2 * (micro_batches * chunks + stages - 1)


def test_each_direction_is_sent_in_the_order_in_which_it_is_received():
    """Messages between two ranks have no name but their order."""
    for name, stages, micro_batches, chunks in (
        *((name, 4, 6, 1) for name in ("afab", "1f1b")),
        ("interleaved", 4, 8, 3),
        ("interleaved", 2, 6, 2),
    ):
        plans = [actions(name, stage, stages, micro_batches, chunks) for stage in range(stages)]
        last = stages * chunks - 1
        for stage in range(stages):
            following = (stage + 1) % stages
            for kind, source, target, shift in (
                ("forward", stage, following, 1),
                ("backward", following, stage, -1),
            ):
                sent = [
                    (number, chunk * stages + source + shift)
                    for k, number, chunk in plans[source]
                    if k == kind
                ]
                sent = [(n, p) for n, p in sent if 0 <= p <= last and p % stages == target]
                taken = [
                    (number, chunk * stages + target)
                    for k, number, chunk in plans[target]
                    if k == kind
                ]
                end = 0 if kind == "forward" else last
                assert sent == [(n, p) for n, p in taken if p != end], (name, stage, kind)


def test_interleaving_needs_whole_rounds():
    with pytest.raises(ConfigError, match=r"Use --train\.accumulation 8, or"):
        interleaved.order(stage=0, stages=4, micro_batches=5, chunks=2)


def test_layers_are_spread_evenly_and_the_last_chunk_has_the_fewest():
    assert chunks_of(7, stages=3, chunks=1) == [[range(3)], [range(3, 5)], [range(5, 7)]]
    assert chunks_of(8, stages=2, chunks=2) == [
        [range(2), range(4, 6)],
        [range(2, 4), range(6, 8)],
    ]
    with pytest.raises(ConfigError, match=r"Use --parallel\.pp 2"):
        chunks_of(2, stages=3, chunks=1)
