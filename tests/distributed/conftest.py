"""Real processes over gloo on the loopback, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

Results = list[subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-layouts", action="store_true", help="every layout of up to 8 ranks")


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., Results]:
    return _run_ranks


def _run_ranks(
    arguments: list[str],
    world_size: int,
    *,
    env: list[dict[str, str]] | None = None,
    timeout_s: float = 120,
) -> Results:
    """`python ARGUMENTS` once per rank, with torchrun's variables; waits for all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(world_size):
        variables = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **(env[rank] if env else {}),
        }
        running.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    # All at once: a rank whose pipe is full waits for its reader, and the others for it.
    with ThreadPoolExecutor(world_size) as readers:
        said = list(readers.map(lambda process: process.communicate(timeout=timeout_s), running))
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(running, said, strict=True)
    ]
