"""Real processes over gloo on the loopback, as torchrun would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest

Results = list[subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-layouts", action="store_true", help="every layout of up to 8 ranks")


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., Results]]:
    """`python ARGUMENTS` once per rank, with torchrun's variables; waits for all of them."""
    server = subprocess.Popen(
        [sys.executable, forked.__file__],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(
        arguments: list[str],
        world_size: int,
        *,
        env: list[dict[str, str]] | None = None,
        timeout_s: float = 120,
    ) -> Results:
        variables = [
            {**os.environ, "OMP_NUM_THREADS": "1", **of_rank, **(env[rank] if env else {})}
            for rank, of_rank in enumerate(forked.variables_of(world_size))
        ]
        with tempfile.TemporaryDirectory() as folder:
            asked = {
                **{"arguments": arguments, "variables": variables, "folder": folder},
                **{"cwd": os.getcwd(), "timeout_s": timeout_s},
            }
            assert server.stdin
            assert server.stdout
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            codes = json.loads(server.stdout.readline())
            said = [
                [(Path(folder) / f"{what}-{rank}").read_text() for what in ("out", "err")]
                for rank in range(world_size)
            ]
        assert None not in codes, f"not done within {timeout_s} s: {codes}, {said}"
        return [
            subprocess.CompletedProcess(arguments, code, out, err)
            for code, (out, err) in zip(codes, said, strict=True)
        ]

    yield run
    server.communicate()
