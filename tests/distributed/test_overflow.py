"""An overflow on one rank is skipped by all, or the others would wait for it for ever."""

import json
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("overflow_steps.py"))


@pytest.mark.parametrize(
    ("attempts", "struck"), [(300, 140), pytest.param(2000, 1000, marks=pytest.mark.slow)]
)
def test_all_ranks_skip_alike_and_as_one_process_does(run_ranks, attempts, struck):
    (alone,) = run_ranks([SCRIPT, str(attempts)], 1)
    assert alone.returncode == 0, alone.stderr
    together = run_ranks([SCRIPT, str(attempts)], 2)
    assert [result.returncode for result in together] == [0, 0], together
    wanted = json.loads(alone.stdout)
    found = [json.loads(result.stdout) for result in together]
    assert found[0] == found[1]
    assert found[0]["scales"] == wanted["scales"]
    assert found[0]["skips"] == wanted["skips"]
    assert wanted["struck"] >= struck
    assert max(wanted["skips"]) > 5
