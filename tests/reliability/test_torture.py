"""kill -9 at any moment, half of them in mid save: the end is that of a run never killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forge
import pytest

SCRIPT = Path(forge.__file__).with_name("torture.py")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_were_not(
    request, tiny, tmp_path, ranks
):
    kills = request.config.getoption("--kills")
    more = ["--train.dtype", "float16", "--backends", "naive-math", "--parallel.zero", "1"]
    command = [
        sys.executable,
        str(SCRIPT),
        str(tmp_path),
        str(kills),
        str(ranks),
        "0",
        *tiny,
        *more,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["kills"] >= kills
    assert told["in_saves"] >= kills // 4
    assert told["resumed"] >= kills // 4
