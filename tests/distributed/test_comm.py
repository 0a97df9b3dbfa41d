"""The collectives, by one contract: `local` alone, `gloo-cpu` among real processes."""

import re
from pathlib import Path

import pytest

RANK = Path(__file__).with_name("comm_checks.py")


@pytest.mark.parametrize(
    ("backend", "world"), [("local", 1), ("gloo-cpu", 1), ("gloo-cpu", 2), ("gloo-cpu", 3)]
)
def test_every_collective_keeps_the_contract(backend, world, run_ranks, tmp_path):
    checks = re.search(r"^CHECKS = \((.*?)\)", RANK.read_text(), re.DOTALL | re.MULTILINE)
    names = checks[1].replace(",", " ").split()
    assert len(names) >= 9
    for result in run_ranks([str(RANK), backend, "check_everything", str(tmp_path)], world):
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == names


def test_a_subgroup_waits_no_longer_than_the_run(run_ranks, tmp_path):
    """torch would give a subgroup half an hour, whatever the run was given."""
    results = run_ranks([str(RANK), "gloo-cpu", "leave_a_subgroup_waiting", str(tmp_path)], 2)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert results[0].stdout == "timed out\n"
