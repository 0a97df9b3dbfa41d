"""Ranks as forks of this process, which has imported torch once: a rank starts in no time."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def fork_ranks(ranks: int, work: Callable[[], object], log: Path) -> list[int]:
    """Call `work` in each of so many children, with torchrun's variables set. It ends by returning,
    or by SystemExit. What they print goes to `log`.

    Returns: the ranks' process ids.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_fork(rank, ranks, port, work, log) for rank in range(ranks)]


def _fork(rank: int, ranks: int, port: int, work: Callable[[], object], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - a child ends here, whatever befell it
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)
