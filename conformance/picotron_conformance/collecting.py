"""Of the suite pytest collects its one test and nothing else, whatever the user's settings are."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).resolve().parent
TEST = SUITE / "test_backend.py"


class Collecting:
    """Registered with pytest while a backend is proven. Knows why a question was not asked."""

    def __init__(self, config: pytest.Config) -> None:
        self._collected: set[str] | None = None  # stays None where only workers collect
        self._deselected: set[str] = set()
        self._stopped: dict[str, str] = {}
        # A project may call its own tests check_*.py; it did not mean to hide this one.
        config.addinivalue_line("python_files", glob.escape(str(TEST)))
        config.addinivalue_line("python_functions", "test_backend")

    def why_not(self, id: str) -> str:
        """Why a question has no answer."""
        if id in self._stopped:
            return f"pytest did not come to ask it: {self._stopped[id]}"
        if id in self._deselected:
            return "deselected"
        if self._collected is None:
            return "deselected, or the session ended before it"
        if id in self._collected:
            return "the session ended before it"
        if self._collected or self._deselected:
            return "not among the tests that pytest was given"
        return (
            f"pytest collected nothing of {TEST}: give --pyargs picotron_conformance, and no "
            "--ignore or conftest.py that hides it"
        )

    # The rest are pytest's hooks.

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """With --doctest-modules every other file of the suite would be imported as a test."""
        path = collection_path.resolve()
        return True if SUITE in path.parents and path != TEST else None

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        self._deselected |= {id for item in items if (id := _question_id(item))}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected = {id for item in session.items if (id := _question_id(item))}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup" and not report.passed:
            lines = str(report.longrepr).strip().splitlines()
            self._stopped[id_of(report.nodeid)] = lines[-1][:300] if lines else report.outcome


def id_of(nodeid: str) -> str:
    """The question in "...test_backend.py::test_backend[norm=acme/fast-forward]"."""
    return nodeid.partition("[")[2].rpartition("]")[0]


def _question_id(item: pytest.Item) -> str:
    callspec: Any = getattr(item, "callspec", None)
    question = None if callspec is None else callspec.params.get("question")
    return str(getattr(question, "id", ""))
