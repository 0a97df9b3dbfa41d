"""A plugin on trial in a child process: it may die, hang or lie there, and hurt nobody.

An import or a kernel can end a process in ways that Python cannot catch (a segmentation fault, an
illegal instruction, `abort`), or never come back. So the first to import a plugin and to call its
kernels is a child; `trial_child` is what runs in it.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryFile
from typing import IO, Any

from picotron_core.hardware import device_of
from picotron_core.registry.types import Request

PATIENCE_S = 30.0  # for one answer
START_S = 300.0  # until the child has imported torch: a slow disk is no fault of the plugin
IMPORT = "its import"
CHILD = "picotron_core.registry.trial_child"


@dataclass(frozen=True, slots=True)
class Task:
    """A kernel to be tried on requests."""

    op: str
    backend: str
    requests: tuple[Request, ...]


def is_passing(evidence: str) -> bool:
    """Whether it tells of the machine's state and not of the plugin: the next start tries again."""
    return "OutOfMemoryError" in evidence or "SIGKILL" in evidence


def try_import(plugin: str, *, patience_s: float = PATIENCE_S, index: int = 0) -> str:
    """Import a plugin and hear its declarations; "" or what went wrong, for the user to read.

    Args:
        index: of the CUDA device to do it on.
    """
    return _try(plugin, (), patience_s, index)[IMPORT]


def try_kernels(
    plugin: str, tasks: Sequence[Task], *, patience_s: float = PATIENCE_S, index: int = 0
) -> dict[Task, str]:
    """Probe each kernel; after one that kills the child another child goes on with the rest."""
    found: dict[Task, str] = {}
    while left := [task for task in tasks if task not in found]:
        answers = _try(plugin, left, patience_s, index)
        if answers[IMPORT]:
            return found | dict.fromkeys(left, answers[IMPORT])
        found |= {left[int(place)]: text for place, text in answers.items() if place != IMPORT}
    return found


def _try(plugin: str, tasks: Sequence[Task], patience_s: float, index: int) -> dict[str, str]:
    """The child's answers until it ends; the last may be about its death."""
    question = {
        "plugin": plugin,
        "path": sys.path,
        "index": index,
        "tasks": [{"op": t.op, "backend": t.backend, "requests": _data(t)} for t in tasks],
    }
    with TemporaryFile() as stderr:
        child = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-X",
                "faulthandler",
                "-m",
                "picotron_core.registry.trial_child",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # so that its own children can be ended with it
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with child.stdin as stdin:
                stdin.write(json.dumps(question))
            return _listen(child, _Lines(child.stdout), stderr, patience_s, len(tasks))
        finally:
            _end(child)
            child.stdout.close()


def _listen(
    child: subprocess.Popen[str], lines: _Lines, stderr: IO[bytes], patience_s: float, tasks: int
) -> dict[str, str]:
    answers: dict[str, str] = {}
    asked = IMPORT
    end = time.monotonic() + START_S
    while True:
        line = lines.next(end - time.monotonic())
        if line is None:
            return answers | {asked: f"it gave no answer within {patience_s:g} s"}
        if not line:  # the pipe is closed: it has ended, or is about to
            return answers | {asked: _death(child, stderr, patience_s)}
        try:
            event = json.loads(line)
        except ValueError:
            return answers | {asked: f"it wrote {line.strip()[:80]!r} in place of an answer"}
        if "begin" in event:
            asked, end = event["begin"], time.monotonic() + patience_s
            continue
        answers[asked] = event["answer"]
        if answers[IMPORT] or len(answers) == tasks + 1:
            return answers
        end = time.monotonic() + START_S


def _death(child: subprocess.Popen[str], stderr: IO[bytes], patience_s: float) -> str:
    try:
        code = child.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        return f"it closed its output and did not end within {patience_s:g} s"
    stderr.seek(0)
    told = stderr.read().decode(errors="replace")
    frame = re.search(r'File "([^"]+)", line (\d+) in (\w+)', told)
    where = "" if frame is None else f" in {frame[3]} ({os.path.basename(frame[1])}:{frame[2]})"
    if code < 0:
        return f"it died of {signal.Signals(-code).name}{where}"
    last = next((line.strip() for line in reversed(told.splitlines()) if line.strip()), "")
    return f"it left with exit code {code} before it answered" + (f": {last[:200]}" if last else "")


def _end(child: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended, and so have its children
        except PermissionError:  # macOS says so of a group of which only a zombie is left
            child.kill()
    else:
        child.kill()
    child.wait()


class _Lines:
    """The lines of a pipe with a limit on waiting: `select` knows no pipes on Windows."""

    def __init__(self, pipe: IO[str]) -> None:
        self._queue: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(pipe,), daemon=True).start()

    def _read(self, pipe: IO[str]) -> None:
        try:
            for line in pipe:
                self._queue.put(line)
        except ValueError:
            pass  # closed by us: nobody waits any more
        self._queue.put("")

    def next(self, timeout_s: float) -> str | None:
        """A line, "" at the end, None when time is up."""
        try:
            return self._queue.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None


def _data(task: Task) -> list[dict[str, Any]]:
    return [{**asdict(request), "features": sorted(request.features)} for request in task.requests]


def request_of(record: dict[str, Any]) -> Request:
    """What `_data` made of a request, made a request again: JSON knows no tuples and no sets."""
    request = Request(**{**record, "device": device_of(record["device"])})
    return replace(request, features=frozenset(request.features))
