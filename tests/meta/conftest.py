"""The mutants and the zoo can be imported; `--meta-all` asks all of them everything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--meta-all", action="store_true", help="every mutant, and the zoo over all its seeds"
    )
