"""Whatever the settings, `picotron train` trains, or ends with one line that says what is wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import judge
import pytest
import tomli_w
from commands import Server
from random_settings import draw_case

STOP_S, HANG_S = 5, 60
DATA_MB = 4000  # beside other work, on a small machine


def test_any_settings_end_well(
    case: int, fuzz_seed: int, server: Server, env: dict[str, str], base: Any, tmp_path: Path
) -> None:
    drawn = draw_case(random.Random(f"settings {fuzz_seed} {case}"), base)
    text = tomli_w.dumps(drawn.values)
    (tmp_path / "config.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    words = ["train", "config.toml", *drawn.flags]
    outcome = server.picotron(
        words,
        cwd=tmp_path,
        env={**env, **drawn.env},
        stop_s=STOP_S,
        timeout_s=STOP_S + HANG_S,
        data_mb=DATA_MB,
    )
    if wrong := judge.fault(outcome):
        pytest.fail(
            f"{wrong}. Again: python -m pytest tests/fuzz/{Path(__file__).name} "
            f"--fuzz-seed {fuzz_seed} --fuzz-case {case}\n"
            f"{words} {drawn.env}\n{text}\n{outcome.said[-3000:]}",
            pytrace=False,
        )
