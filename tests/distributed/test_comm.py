"""Every comm backend that a CPU can run, in real processes, on integers bit for bit."""

from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("collectives_of_a_rank.py"))


@pytest.mark.parametrize(
    ("backend", "world_size"), [("local", 1), ("gloo-cpu", 1), ("gloo-cpu", 2), ("gloo-cpu", 3)]
)
def test_every_collective_is_exact(run_ranks, backend, world_size):
    results = run_ranks([SCRIPT, backend], world_size)
    for result in results:
        assert (result.returncode, result.stdout.strip()) == (0, "ok"), result.stderr
        assert "Warning" not in result.stderr
