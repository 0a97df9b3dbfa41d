"""Real processes over gloo on the loopback, as torchrun would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
        strangers: bool = False,
    ) -> Results:
        """strangers: each is started by itself, with a hash seed of its own, and no fork: what they
        take from sets comes in another order on each.
        """
        variables = [
            {**os.environ, "OMP_NUM_THREADS": "1", **of_rank, **(env[rank] if env else {})}
            for rank, of_rank in enumerate(forked.variables_of(world_size))
        ]
        if strangers:
            return _started(arguments, variables, timeout_s)
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


def _started(arguments: list[str], variables: list[dict[str, str]], timeout_s: float) -> Results:
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**of_rank, "PYTHONHASHSEED": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, of_rank in enumerate(variables)
    ]
    # All at once: a rank whose pipe is full waits for its reader, and the others for it.
    with ThreadPoolExecutor(len(running)) as readers:
        said = list(readers.map(lambda process: process.communicate(timeout=timeout_s), running))
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(running, said, strict=True)
    ]
