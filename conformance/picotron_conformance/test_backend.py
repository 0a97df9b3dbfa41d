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
    if proof is None:
        pytest.exit(
            "Say what to prove: --picotron-backend OP=NAME, NAME, or all. "
            "`picotron backends` lists what is there.",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )
    metafunc.parametrize("question", proof.questions, ids=[q.id for q in proof.questions])


def test_backend(question: Question, request: pytest.FixtureRequest) -> None:
    request.config.stash[PROOF].answer(question, request.node)
