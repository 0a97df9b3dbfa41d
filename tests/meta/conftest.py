"""The mutants and the zoo can be imported; `--meta-all` asks all of them everything."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)

# Imported by this path, which then goes again: on it lies the metadata of an installed plugin, and
# the tests of other folders would find that.
sys.path.insert(0, HERE)
for module in ("picotron_mutants", "picotron_zoo", "trials"):
    import_module(module)
sys.path.remove(HERE)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--meta-all", action="store_true", help="every mutant, and the zoo over all its seeds"
    )
