"""What any layout saved, any other goes on with: the same next loss, the same samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("reshard_steps.py")
SUPPORT = Path(__file__).parents[1] / "support"
SAVED, STEPS, GLOBAL_BATCH = 2, 4, 12

FEW: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "2 slices": {"parallel": {"tp": 2, "sequence": True}},
        "2 stages": {"accumulation": 2, "parallel": {"pp": 2, "schedule": "interleaved"}},
    },
    3: {"ZeRO of 3": {"accumulation": 2, "parallel": {"zero": 1}}},
    4: {
        "2 slices of 2 stages": {"accumulation": 2, "parallel": {"pp": 2, "tp": 2}},
        "2 parts for ZeRO of 4": {"parallel": {"cp": 2, "zero": 1}},
    },
}
MORE: dict[int, dict[str, dict[str, Any]]] = {  # for `make parity`
    2: {
        "2 replicas": {"accumulation": 2},
        "ZeRO of 2": {"parallel": {"zero": 1}},
        "2 parts of sequences": {"parallel": {"cp": 2}},
    },
    3: {"3 stages": {"accumulation": 3, "parallel": {"pp": 3}}, "3 replicas": {}},
    4: {
        "ZeRO of 4": {"parallel": {"zero": 1}},
        "4 slices": {"parallel": {"tp": 4}},
        "4 stages": {"accumulation": 3, "parallel": {"pp": 4, "schedule": "afab"}},
    },
}


def layouts_of(config: pytest.Config) -> dict[int, dict[str, dict[str, Any]]]:
    if not config.getoption("--all-layouts", default=False):
        return FEW
    return {ranks: {**few, **MORE.get(ranks, {})} for ranks, few in FEW.items()}


def told_by(layouts: dict[int, dict[str, dict[str, Any]]], folder: Path) -> dict[str, list[dict]]:
    """layout, or "layout from layout" -> what each of its ranks told."""
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(layouts)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    found: dict[str, list[dict]] = {}
    for ranks in layouts:
        for when in ("before", "after"):
            for rank in range(ranks):
                said = json.loads((folder / f"{ranks}-{when}-{rank}.json").read_text())
                for name, of_rank in said.items():
                    found.setdefault(name, []).append(of_rank)
    return found


def test_any_layout_goes_on_with_what_any_other_saved(tmp_path, pytestconfig):
    layouts = layouts_of(pytestconfig)
    told = told_by(layouts, tmp_path)
    (alone,) = told["one"]
    # Or equal losses and samples would show little.
    assert all(abs(one / other - 1) > 1e-4 for one, other in pairwise(alone["losses"].values()))
    assert len({sample for _, sample in alone["read"]}) == STEPS * GLOBAL_BATCH
    to_read = Counter((step, sample) for step, sample in alone["read"] if step >= SAVED)

    names = [name for of_size in layouts.values() for name in of_size]
    wrong = []
    for before, after in product(names, names):
        goes_on, uninterrupted = told[f"{after} from {before}"], told[before][0]
        for rank in goes_on:
            assert rank["tokens"] == uninterrupted["tokens"]
            # The moments show in the fourth, after an update that adds sums in another order.
            for step, rtol in (("3", 1e-6), ("4", 1e-5)):
                loss, right = rank["losses"][step], uninterrupted["losses"][step]
                if not abs(loss - right) <= rtol * right:
                    wrong.append(f"{after} from {before}: step {step} has {loss}, not {right}")
        read = Counter((step, sample) for rank in goes_on for step, sample in rank["read"])
        if read != to_read:
            wrong.append(f"{after} from {before}: samples with a gap, or a repeat")
    assert wrong == []
