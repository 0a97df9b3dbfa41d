"""`picotron compare dp-zero`: its numbers against the arithmetic, and its verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from picotron_core.cli.compare.dp_zero import Found, Way, checks
from picotron_core.cli.compare.trial import Trial

RANKS = 2


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared") / "found.json"
    command = [sys.executable, "-m", "picotron_core.cli", "compare", "dp-zero", *tiny]
    result = subprocess.run(
        [*command, "--nproc", str(RANKS), "--steps", "2", "--json", str(output)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(output.read_text())


def test_every_number_is_what_the_arithmetic_says(compared):
    _, answer = compared
    replicas, shards, low = answer["ways"]
    P = replicas["ranks"][0]["parameters"]
    for way, divided in ((replicas, 1), (shards, RANKS), (low, RANKS)):
        assert len(way["ranks"]) == RANKS
        for rank in way["ranks"]:
            assert rank["weights"] == 4 * P
            for part, size in (("masters", 4), ("moments", 8), ("gradients", 4)):
                assert 0 <= rank[part] - size * P / divided < size * RANKS, (way["name"], part)
        for part, size in (("masters", 4), ("moments", 8), ("gradients", 4)):
            assert sum(rank[part] for rank in way["ranks"]) == size * P * RANKS / divided
    half = (RANKS - 1) / RANKS
    three = 2 * half * 3 * 8  # the loss, the tokens and the norm, summed over the ranks
    for way, bytes_each in ((replicas, 2 * 4), (shards, 4 + 4), (low, 2 + 4)):
        assert way["sent"] == pytest.approx(half * bytes_each * P + three, abs=8 * RANKS)
    kinds = set(low["ranks"][0]["sent"])
    assert kinds == {"reduce_scatter bfloat16", "all_gather float32", "all_reduce float64"}


def test_all_ways_train_the_same_steps_and_say_so(compared):
    out, answer = compared
    replicas, shards, low = ([trial["losses"] for trial in way["timed"]] for way in answer["ways"])
    assert replicas[0] == replicas[1]  # forwards and backwards
    assert len(set(replicas[0])) == 3
    assert shards[0] == pytest.approx(replicas[0], rel=1e-5)
    assert low[0] == pytest.approx(replicas[0], rel=1e-2)
    assert low[0] != shards[0]
    assert all(check["holds"] for check in answer["checks"])
    assert out.count("yes  ") == len(answer["checks"]) == 6
    for title in (
        "moments, MiB",
        "all that is sent, MiB",
        "peak of a step, MiB",
        "as it is counted",
        "median step",
    ):
        assert out.count(title) == 1


def trial(**changed):
    whole = {"parameters": 100, "weights": 400, "masters": 400, "gradients": 400, "moments": 800}
    whole |= {"losses": [2.0, 1.0], "step_s": [1.0], "start": None, "most": None}
    kinds = {"sent": {"all_reduce float32": 400}, "collectives": {"all_reduce float32": 1}}
    return Trial(**{**whole, **kinds, **changed})


def test_what_does_not_hold_is_told():
    def way(zero, *ranks):
        way = Way(name="x", zero=zero, reduce="float32")
        return Found(way=way, counted=0, ranks=list(ranks), timed=[ranks[0]])

    sent = {"sent": {"reduce_scatter float32": 400}}
    collectives = {"collectives": {"reduce_scatter float32": 1}}
    good = trial(moments=408, **sent, **collectives)

    def verdicts(*ranks):
        found = [way(0, trial(), trial()), way(1, *ranks)]
        return [right for _, right in checks(found, dtype="float32", sharers=2)]

    assert verdicts(good, good) == [True, True, True]
    assert verdicts(replace(good, losses=[2.0, 1.001]), good) == [False, True, True]
    assert verdicts(replace(good, losses=[2.0, None]), good) == [False, True, True]
    assert verdicts(good, replace(good, sent={"all_gather": 401})) == [True, False, True]
    assert verdicts(good, replace(good, moments=416)) == [True, True, False]


def test_one_rank_has_nobody_to_divide_with(picotron, tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, _, err = picotron("compare", "dp-zero", *tiny)
    assert code == 2
    assert "Start more ranks (--nproc)" in err
