"""Attention over sequences that several ranks divide is held to what attention is held to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from picotron_core.ops.attention import visible
from picotron_core.parallel.context import blocks, own

SCRIPT = Path(__file__).with_name("ring_values.py")


def ask_ranks(run_ranks, world_size: int, backend: str, what: str) -> list[dict]:
    results = run_ranks([str(SCRIPT), backend, what], world_size)
    for result in results:
        assert result.returncode == 0, result.stderr
    return [json.loads(result.stdout) for result in results]


@pytest.mark.parametrize(("world_size", "backend"), [(3, "naive-math"), (4, "mem_efficient")])
def test_a_ring_is_right_within_the_limits_of_the_conformance_suite(run_ranks, world_size, backend):
    for rank in ask_ranks(run_ranks, world_size, backend, "values"):
        assert rank["asked"] > 40
        assert rank["wrong"] == []


def test_the_memory_of_a_rank_falls_with_the_number_of_ranks(run_ranks):
    two, four = (
        max(rank["peak"] for rank in ask_ranks(run_ranks, ranks, "mem_efficient", "peak"))
        for ranks in (2, 4)
    )
    # Beyond the parts of q, k and v. Of the 27 MB of two ranks 3 are the blocks that attention
    # works in, whatever the length; with all keys on every rank it would be 0.65.
    assert four / two < 0.58


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_every_query_meets_every_key_that_it_sees_once(ranks, window, causal):
    if window and not causal:
        return
    half = 3
    tokens = 2 * half
    position = torch.arange(ranks * tokens)[None]
    for mine in range(ranks):
        met = torch.zeros(tokens, ranks * tokens, dtype=torch.int)
        own_positions = own(position, mine, ranks, dim=1)[0]
        for theirs in range(ranks):
            keys = own(position, theirs, ranks, dim=1)[0]
            for block in blocks(
                mine, theirs, ranks=ranks, tokens=tokens, causal=causal, window=window
            ):
                rows = torch.arange(tokens)[block.queries]
                columns = keys[block.keys]
                met[rows[:, None], columns] += visible(
                    T=len(rows),
                    S=len(columns),
                    causal=block.causal,
                    window=window if block.offset is not None else None,
                    doc_ids=None,
                    device=torch.device("cpu"),
                    offset=block.offset,
                )[0, 0].int()
        distance = own_positions[:, None] - position
        wanted = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
        if window:
            wanted &= distance < window
        assert torch.equal(met, wanted.int())


def test_every_rank_computes_alike_much():
    def products(mine: int) -> int:
        every = [
            block
            for theirs in range(4)
            for block in blocks(mine, theirs, ranks=4, tokens=16, causal=True, window=None)
        ]
        size = lambda part: part.stop - part.start  # noqa: E731
        return sum(size(b.queries) * size(b.keys) // (2 if b.causal else 1) for b in every)

    assert len({products(mine) for mine in range(4)}) == 1
