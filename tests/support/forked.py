"""Ranks as forks of a process that has imported torch once: each starts in no time, and is from
then on a process like any other.
"""

from __future__ import annotations

import json
import math
import os
import resource
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any


def variables_of(ranks: int) -> list[dict[str, str]]:
    """torchrun's, of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(ranks)]


def fork(work: Callable[[], object], out: Path, err: Path, variables: Mapping[str, str]) -> int:
    """Call `work` in a child, which ends as a script would: by returning, SystemExit or an error.

    Args:
        out, err: files that what it prints is appended to.
        variables: all of its environment.

    Returns: its process id.
    """
    child = os.fork()
    if child:
        return child
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    code: Any = 0
    try:
        work()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - it must not go on as a copy of its parent
        traceback.print_exc()
        code = 1
    _end(code)


def _end(code: Any) -> Any:
    """As the interpreter does, but without unwinding what the parent has on its stack."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def fork_ranks(ranks: int, work: Callable[[], object], log: Path) -> list[int]:
    """Call `work` in each of so many ranks; what they print goes to `log`. Their process ids."""
    return [fork(work, log, log, {**os.environ, **of_rank}) for of_rank in variables_of(ranks)]


def serve() -> None:
    """`python forked.py`: a request a line, answered by a line when all of its children have ended.

    {"arguments": as after `python`, "variables": [all of a child's environment, ...], "cwd",
    "folder": for out-N and err-N, "timeout_s"} -> exit codes, null of those that were killed then.
    With "stop_s", each code is a pair with whether it got SIGTERM; "data_mb" limits memory.
    """
    import matplotlib.figure
    import picotron_conformance.run
    import torch.distributed

    from picotron_core.cli import app, train

    assert all((matplotlib.figure, picotron_conformance.run, torch.distributed, app, train))
    for line in sys.stdin:
        asked = json.loads(line)
        folder = Path(asked["folder"])
        children = [
            fork(partial(_script, asked), folder / f"out-{n}", folder / f"err-{n}", variables)
            for n, variables in enumerate(asked["variables"])
        ]
        end = time.monotonic() + asked["timeout_s"]
        if "stop_s" in asked:
            stop = time.monotonic() + asked["stop_s"]
            ended = [(wait(child, end, stop=stop), time.monotonic() > stop) for child in children]
            print(json.dumps(ended), flush=True)
        else:
            print(json.dumps([wait(child, end) for child in children]), flush=True)


def _script(asked: dict[str, Any]) -> None:
    if limit := asked.get("data_mb"):
        resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))
    os.chdir(asked["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    first, *rest = asked["arguments"]
    sys.path[0] = asked["cwd"] if first.startswith("-") else str(Path(first).parent)
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def wait(child: int, end: float, *, stop: float = math.inf) -> int | None:
    """Its exit code; None if it has not ended by then, and was killed.

    Args:
        stop: when it gets SIGTERM.
    """
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > stop:
            os.kill(child, signal.SIGTERM)
            stop = math.inf
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


if __name__ == "__main__":
    serve()
