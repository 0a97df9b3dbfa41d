"""No right kernel is accused, whatever the seed."""

from __future__ import annotations

from collections import Counter

import pytest
from picotron_conformance.check import Check, Outcome, Verdict
from picotron_zoo import ZOO, Kept, backend_of
from trials import DEATHS, candidate_of, outcomes

SEEDS = 200
SEEDED = frozenset({"gradient", "update"})  # by the seed; a gradient is judged with its outputs
SHARE = 16  # of the named cases, each seed asks one in so many: all of them in as many seeds
OPS = tuple(dict.fromkeys(kept.op for kept in ZOO))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--meta-all", default=False)
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(SEEDS if everything else 1))
    if "kept" in metafunc.fixturenames:
        some = ZOO if everything else ZOO[SHARE::SHARE]
        slow = [pytest.mark.slow] if not everything else []
        metafunc.parametrize(
            "kept",
            [pytest.param(kept, marks=slow if kept.op == "attention" else []) for kept in some],
            ids=[f"{kept.op}-{kept.name}" for kept in some],
        )


def _told(accusation: Outcome) -> str:
    return f"{accusation.id}: {accusation.verdict}: {accusation.detail}"


@pytest.mark.parametrize("op", OPS)
def test_values_are_right_by_any_seed(op: str, seed: int) -> None:
    """All kernels of an op in one process: golden results are made once."""

    def wanted(place: int, check: Check) -> bool:
        turn = place // 2 % SHARE == seed % SHARE  # every second check is a gradient
        return check.name in SEEDED and (turn or check.case.startswith("drawn"))

    for kept in ZOO:
        if kept.op == op:
            found = list(outcomes(candidate_of(backend_of(kept), "zoo"), wanted, seed=seed))
            assert Verdict.PASS in {outcome.verdict for outcome in found}
            assert not [_told(outcome) for outcome in found if outcome.verdict in DEATHS]


def test_a_right_kernel_passes_every_other_check(kept: Kept) -> None:
    found = outcomes(
        candidate_of(backend_of(kept), "zoo"), lambda _, check: check.name not in SEEDED
    )
    assert not [_told(outcome) for outcome in found if outcome.verdict in DEATHS]


def test_there_are_enough_of_them() -> None:
    assert len(ZOO) >= 12
    assert {"attention", "norm", "rope", "swiglu", "loss", "optimizer"} <= set(OPS)
    twice = [key for key, n in Counter((kept.op, kept.name) for kept in ZOO).items() if n > 1]
    assert not twice
