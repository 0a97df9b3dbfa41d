"""The collectives under the conformance suite, and what it says of ranks that go wrong."""

import re
from functools import cache, partial
from pathlib import Path

import pytest
from picotron_conformance.check import Verdict
from picotron_conformance.ranks import world
from picotron_conformance.run import ask, plan, target_of

from picotron_core.hardware import profile
from picotron_core.registry.plugins import load_registry

CPU = profile("cpu")


@pytest.fixture(autouse=True)
def _no_ranks_left():
    yield
    world.end_all()


def outcomes(qualified_name, size="quick", wanted=lambda check: True):
    plugins = [name for name in [qualified_name.partition("/")[0]] if name != "picotron"]
    (candidate,) = (
        candidate
        for candidate in load_registry(plugins).candidates
        if (candidate.backend.op, candidate.qualified_name) == ("comm", qualified_name)
    )
    load = cache(partial(target_of, candidate, device=CPU, profile=size, seed=0))
    return [
        ask(candidate, check, load, device=CPU)
        for check in plan("comm", device=CPU, profile=size, seed=0)
        if wanted(check)
    ]


def test_a_subgroup_waits_no_longer_than_the_run():
    """torch would give a subgroup half an hour, whatever the run was given."""
    (outcome,) = outcomes(
        "picotron/gloo-cpu",
        "full",
        lambda check: (check.name, check.case) == ("timeout", "world-2"),
    )
    assert outcome.verdict is Verdict.PASS, outcome.detail


@pytest.mark.parametrize(
    ("mutant", "families", "verdict", "said"),
    [
        (
            "hangs",
            ("barrier", "group-messages"),
            Verdict.TIMEOUT,
            r"rank 1 is at comm.py:\d+ barrier",
        ),
        ("dies", ("broadcast", "group-messages"), Verdict.ERROR, "rank 2 of 3.* exit code 3"),
        ("nothing_reduced", ("all-reduce", "all-gather"), Verdict.FAIL, r"of 3: all_reduce\(sum"),
    ],
)
def test_ranks_that_go_wrong_are_named_and_the_next_check_is_asked(
    mutant, families, verdict, said, monkeypatch
):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "meta")
    monkeypatch.setattr(world, "LIMIT_S", 3.0)
    wrong, right = outcomes(
        f"mutants/{mutant}",
        wanted=lambda check: (
            (check.case, check.dtype) == ("world-3", "float32") and check.name in families
        ),
    )
    assert (wrong.verdict, right.verdict) == (verdict, Verdict.PASS)
    assert re.search(said, wrong.detail), wrong.detail
