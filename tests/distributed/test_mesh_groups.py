"""The mesh as torch's own `DeviceMesh`, over the groups that the comm op made."""

from __future__ import annotations

import json
from pathlib import Path

SCRIPT = Path(__file__).with_name("mesh_groups.py")


def test_torchs_device_mesh_has_the_axes_and_their_groups(run_ranks):
    results = run_ranks([str(SCRIPT)], 4)
    for rank, result in enumerate(results):
        assert result.returncode == 0, result.stderr
        grid, line = json.loads(result.stdout)
        stage, slice_ = divmod(rank, 2)  # tp's ranks are neighbours
        # Rank r gives 10^r, so that a sum tells who is in it; ours, and torch's.
        up, across = [101, 1010][slice_], [11, 1100][stage]
        assert grid == {
            "names": ["pp", "tp"],
            "shape": [2, 2],
            "place": [stage, slice_],
            "sums": {"pp": [up, up], "tp": [across, across]},
        }
        assert line == {
            "names": ["tp"],
            "shape": [4],
            "place": [rank],
            "sums": {"tp": [1111, 1111]},
        }
