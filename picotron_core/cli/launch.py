"""`picotron train --nproc N`: the same command on N ranks of this machine."""

from __future__ import annotations

import logging
import signal
import sys
import uuid
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from picotron_core.cli import INTERRUPTED
from picotron_core.cli.model import draft_of, replicas_of
from picotron_core.cli.stop import REQUEUE
from picotron_core.errors import RunError
from picotron_core.parallel.world import WORD, make_ready
from picotron_core.schema import Config

SAVE_S = 600  # Ctrl-C: what a save may take before torch's launcher kills its rank


def launch(nproc: int, arguments: Sequence[str], config: Config) -> int:
    """Start `picotron ARGUMENTS` as ranks 0 to N - 1 under torch's elastic launcher, wait for them.

    Args:
        config: what the arguments say, for a layout that cannot be is told here, once, and not by
            every rank.

    Returns: the exit code of the rank that failed first, that of all that were asked to stop, or 0.
    Raises: RunError where a signal ended it, which it could not say itself; ConfigError under
        torchrun, which starts ranks of its own, and for that layout.
    """
    make_ready(nproc)
    replicas_of(config, draft_of(config), nproc)
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say what is wrong; the launcher would say it again, at length.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {}
    if "shutdown_timeout" in signature(LaunchConfig).parameters:  # torch 2.13
        options["shutdown_timeout"] = SAVE_S
        options["signals_to_handle"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    with TemporaryDirectory(prefix="picotron-") as folder:  # else torch leaves one behind each time
        torchs = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **options,
        )
        command = ["-m", "picotron_core.cli", *arguments]
        try:
            elastic_launch(torchs, sys.executable)(*command)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                raise RunError(f"Rank {rank} died of {name}; the others were stopped.") from None
            return int(failure.exitcode)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                return INTERRUPTED
            told = {int(path.read_text()) for path in Path(folder).rglob(WORD)}
            if failed := told - {0, REQUEUE}:
                return max(failed)
            if told == {0}:  # they were done
                return 0
            # Ranks that say nothing were killed: before they could listen, or in a save that took
            # too long. What was saved before is gone on from.
            asked = error.sigval in (signal.SIGTERM, signal.SIGUSR1)
            return REQUEUE if asked else 128 + int(error.sigval)
    return 0


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """A command line that asks for no ranks."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
