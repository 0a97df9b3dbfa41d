"""`picotron` commands as forks of one process that has imported torch, each with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import forked


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended. code: None where it had to be killed, negative for a signal."""

    code: int | None
    out: str
    err: str
    was_asked_to_stop: bool

    @property
    def said(self) -> str:
        return self.out + self.err


@dataclass(frozen=True, slots=True)
class Server:
    """The process that is forked."""

    requests: IO[str]
    answers: IO[str]

    def picotron(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stop_s: float = 1e9,
        timeout_s: float = 300,
        data_mb: int = 0,
    ) -> Outcome:
        """Run a command.

        Args:
            env: all of its variables.
            stop_s: after which it gets SIGTERM.
            timeout_s: after which it is killed.
            data_mb: what it may allocate at most; 0: no limit.
        """
        with tempfile.TemporaryDirectory() as folder:
            asked = {
                **{"arguments": ["-m", "picotron_core.cli", *words], "variables": [dict(env)]},
                **{"folder": folder, "cwd": str(cwd), "timeout_s": timeout_s, "stop_s": stop_s},
                "data_mb": data_mb,
            }
            self.requests.write(json.dumps(asked) + "\n")
            self.requests.flush()
            (code, was_asked_to_stop) = json.loads(self.answers.readline())[0]
            out, err = (
                Path(folder, f"{what}-0").read_text(encoding="utf-8", errors="replace")
                for what in ("out", "err")
            )
        return Outcome(code, out, err, was_asked_to_stop)


@contextmanager
def serving() -> Iterator[Server]:
    """A process that has imported torch and Picotron."""
    server = subprocess.Popen(
        [sys.executable, forked.__file__],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin
    assert server.stdout
    try:
        yield Server(server.stdin, server.stdout)
    finally:
        server.communicate()
