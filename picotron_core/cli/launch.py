"""`picotron train --nproc N`: the same command on N ranks of this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from picotron_core.cli import INTERRUPTED
from picotron_core.errors import RunError
from picotron_core.parallel.world import make_ready

WORD = "exit-code"  # a file beside the one that torch's launcher gives each rank for its error
SAVE_S = 600  # Ctrl-C: what a save may take before torch's launcher kills its rank


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Start `picotron ARGUMENTS` as ranks 0 to N - 1 under torch's elastic launcher, wait for them.

    Returns: the exit code of the rank that failed first, that of all that were asked to stop, or 0.
    Raises: RunError where a signal ended it, which it could not say itself; ConfigError under
        torchrun, which starts ranks of its own.
    """
    make_ready(nproc)
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
        config = LaunchConfig(
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
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                raise RunError(f"Rank {rank} died of {name}; the others were stopped.") from None
            return int(failure.exitcode)
        except SignalException as error:
            number = int(error.sigval)
            told = [int(path.read_text()) for path in Path(folder).rglob(WORD)]
            # Where none did they failed, or were killed: nothing for a scheduler to start again.
            return INTERRUPTED if number == signal.SIGINT else max(told, default=128 + number)
    return 0


def tell(code: int) -> None:
    """Leave word of how a rank ends that was asked to stop: of a launcher that passed a signal on,
    torch does not say how its ranks ended.
    """
    if errors := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(errors).with_name(WORD).write_text(str(code))


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
