"""`picotron` commands as forks of one process that has imported torch: each starts at once, and is
from then on a real process, with the descriptors, ignored signals and terminal of a test.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked

WAIT_S = 300  # only ends a hang: a busy machine is no failure
CLOSED = ""


@dataclass(frozen=True)
class Command:
    """A command that runs, or has run. out: the file that its output goes to unless told."""

    zygote: Zygote
    pid: int
    out: Path

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; -N where signal N ended it."""
        code = self.zygote.ask({"wait": self.pid, "timeout_s": WAIT_S})
        assert code is not None, f"it hangs; {self.text()}"
        return int(code)

    def is_running(self) -> bool:
        return bool(self.zygote.ask({"poll": self.pid}))

    def until(self, path: Path, text: str = "") -> None:
        """Wait until a file that matches is there and has a text in it."""
        self.until_true(lambda: any(text in _text(one) for one in path.parent.glob(path.name)))

    def until_true(self, check: Any) -> None:
        end = time.monotonic() + WAIT_S
        while not check():
            assert self.is_running(), f"it has ended: {self.wait()}, {self.text()}"
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def text(self) -> str:
        """What it has printed."""
        return _text(self.out)


class Zygote:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._count = 0

    def ask(self, question: Mapping[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        *arguments: str,
        cwd: Path,
        files: Mapping[int, str] | None = None,
        ignored: Sequence[int] = (),
        terminal: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> Command:
        """Start `picotron ARGUMENTS` in a session of its own.

        Args:
            files: of the descriptors 0, 1 and 2: a path to open, or CLOSED; else the null device
                and a new file for both.
            ignored: signals that are ignored when it starts.
            terminal: the file on descriptor 0 becomes its controlling terminal.
        """
        self._count += 1
        out = cwd / f"out-{self._count}.txt"
        out.touch()
        asked = {
            **{"arguments": arguments, "cwd": str(cwd), "ignored": [*ignored]},
            **{"terminal": terminal, "variables": dict(variables or {})},
            "files": {0: os.devnull, 1: str(out), 2: str(out), **(files or {})},
        }
        return Command(self, self.ask(asked), out)

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(WAIT_S)
        self._process.stdout.close()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def main() -> None:
    """Answer one request a line. What still runs at the end of input is killed."""
    import matplotlib.figure
    import transformers

    from picotron_core.cli import app, export, generate, job, train

    assert all((matplotlib.figure, transformers, app, export, generate, train))
    job.matrix_product_rate = lambda *_: 1e12  # only for MFU, and half a second of every start
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if pid := asked.get("wait"):
            answer = codes[pid] if codes[pid] is not None else forked.wait(pid, _end(asked))
            codes[pid] = answer
        elif pid := asked.get("poll"):
            if codes[pid] is None and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
            answer = codes[pid] is None
        else:
            answer = os.fork()
            if not answer:
                _become(asked)
            codes[answer] = None
        print(json.dumps(answer), flush=True)
    for pid in [pid for pid, code in codes.items() if code is None]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _end(asked: Mapping[str, Any]) -> float:
    return time.monotonic() + float(asked["timeout_s"])


def _become(asked: Mapping[str, Any]) -> None:
    """In the child: the command, until it ends."""
    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.update(asked["variables"])
    for number in asked["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    opened = {
        int(number): os.open(path, os.O_RDWR if int(number) == 0 else os.O_WRONLY | os.O_APPEND)
        for number, path in asked["files"].items()
        if path != CLOSED
    }
    for number in range(3):
        if number in opened:
            os.dup2(opened[number], number)
            os.close(opened[number])
        else:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    if asked["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.argv = ["picotron", *asked["arguments"]]
    code: Any = 1
    try:
        from picotron_core import cli

        cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - it must not go on as a copy of its parent
        import traceback

        traceback.print_exc()
    _leave(code)


def _leave(code: Any) -> None:
    """As the interpreter does, which ends with 120 where it cannot print what is left."""
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except OSError:
        os._exit(120)
    os._exit(code or 0)


if __name__ == "__main__":
    main()
