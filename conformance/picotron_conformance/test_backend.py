"""The suite, as pytest sees it: one test a check of a backend.

pytest --pyargs picotron_conformance --picotron-backend attention=acme/flash
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from picotron_conformance.plugin import PROOF

if TYPE_CHECKING:
    from picotron_conformance.proof import Question


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    proof = metafunc.config.stash.get(PROOF, None)
    questions = [] if proof is None else proof.questions  # the plugin says what is missing
    metafunc.parametrize("question", questions, ids=[question.id for question in questions])


def test_backend(question: Question, request: pytest.FixtureRequest) -> None:
    request.config.stash[PROOF].answer(question, request.node)
