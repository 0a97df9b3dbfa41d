"""Random cases, each a function of (seed, number): the process that runs them is started once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest

from picotron_core.config import ENVIRONMENT

CASES = 20  # in CI; `make fuzz` asks for 500 of each kind


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seed", type=int, default=0, help="another seed, other cases")
    parser.addoption("--fuzz-count", type=int, default=CASES, help="cases of each kind")
    parser.addoption("--fuzz-case", type=int, help="this case alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        only = metafunc.config.getoption("--fuzz-case", default=None)
        count = metafunc.config.getoption("--fuzz-count", default=CASES)
        metafunc.parametrize("case", range(count) if only is None else [only])


@pytest.fixture(scope="session")
def fuzz_seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz-seed", default=0))


@pytest.fixture(scope="session")
def fuzz_all(request: pytest.FixtureRequest) -> bool:
    """Whether a damaged run is used by all commands; in CI by two of them."""
    options = ("--fuzz-count", "--fuzz-case")
    given = [request.config.getoption(name, default=None) for name in options]
    return given != [CASES, None] and given != [None, None]


@pytest.fixture(scope="session")
def server() -> Iterator[commands.Server]:
    with commands.serving() as server:
        yield server


@pytest.fixture(scope="session")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Nothing of the user's own, and no network."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    return {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def base(text_folder: Path, cache_dir: Path) -> dict[str, dict[str, object]]:
    """A config that trains within a second."""
    return {
        "model": {
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
        },
        "data": {
            **{"paths": [str(text_folder)], "cache_dir": str(cache_dir), "vocab_size": 300},
            **{"seq_len": 16, "val_fraction": 0.2},
        },
        "train": {
            **{"steps": 4, "micro_batch": 2, "eval_samples": 4, "warmup_steps": 1},
            **{"dtype": "float32", "lr": 0.01},
        },
        "checkpoint": {"every": 2},
        "run": {"device": "cpu", "name": "a"},
    }
