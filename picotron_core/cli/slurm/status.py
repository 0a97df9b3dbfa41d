"""`picotron slurm status | resubmit | csv`: what became of jobs, and of the runs in them."""

from __future__ import annotations

import csv as csv_format
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from picotron_core.cli.paths import located
from picotron_core.cli.slurm import scheduler
from picotron_core.cli.slurm.folder import JobFolder, Record
from picotron_core.cli.slurm.progress import Progress, progress, settings_of
from picotron_core.cli.slurm.scheduler import SlurmState
from picotron_core.cli.terminal import open_console
from picotron_core.errors import ConfigError, RunError

PIPE_WIDTH = 200  # columns where no terminal says how many there are
# Settings that say where a run is, not what it is.
PLACES = ("run.name", "run.dir", "run.resume", "run.log_every", "data.cache_dir")


UNKNOWN = SlurmState("UNKNOWN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is in the queue, what the accounting says (a cluster need not have one), and what holds
    for all others.
    """

    queue: Mapping[str, SlurmState] = field(default_factory=dict)
    ended: Mapping[str, SlurmState] = field(default_factory=dict)
    otherwise: SlurmState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run, in a job or by itself. slurm: what Slurm says of it now, or said last, if it knows."""

    path: Path
    settings: Mapping[str, Any]
    progress: Progress
    task: int | None = None
    slurm_id: str = ""
    queued: bool = False
    slurm: SlurmState | None = None

    @property
    def steps(self) -> int:
        return int(self.settings["train.steps"])

    @property
    def finished(self) -> bool:
        return self.progress.saved >= self.steps

    @property
    def goes_on(self) -> bool:
        """Whether it is to be submitted again: certain only where Slurm was asked."""
        return not self.finished and not self.queued and self.slurm != UNKNOWN

    @property
    def state(self) -> str:
        """In one word. "stopped": not finished, and not known to Slurm any more; "unknown": Slurm
        could not be asked.
        """
        if self.slurm and self.queued:
            return self.slurm.state.lower()
        if self.finished:
            return "finished"
        if self.slurm and self.slurm.state != "COMPLETED":
            return self.slurm.state.lower()
        return "stopped"


def show_status(path: Path) -> int:
    """A line for each run of a job."""
    states = _of_job(JobFolder(path))
    table = Table("task", "job", "run", "state", "step", box=None, header_style="bold")
    for column in ("saved", "loss", "val_loss", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_column("waits for")
    for run in states:
        now = run.progress
        table.add_row(
            *(str(run.task), run.slurm_id, escape(run.path.name), run.state),
            *(f"{now.step}/{run.steps}", str(now.saved)),
            *(_number(now.loss, ".4f"), _number(now.val_loss, ".4f")),
            _number(now.tokens_per_s, ",.0f"),
            escape(run.slurm.reason) if run.slurm and run.queued else "",
        )
    open_console(width=PIPE_WIDTH).print(table)
    if any(run.goes_on for run in states):
        print(f"\nTo go on with those that stopped: picotron slurm resubmit {path}")
    return 0


def resubmit_stopped(path: Path, more: Sequence[str], *, dry_run: bool) -> int:
    """Submit again what is neither finished nor in the queue.

    Raises: RunError where the queue cannot be asked: two jobs in one run's folder would ruin it.
    """
    states = _of_job(JobFolder(path), strict=True)
    queued = [run for run in states if run.queued]
    stopped = [run for run in states if run.goes_on]
    if not stopped:
        done = len(states) - len(queued)
        print(f"Nothing to submit: {done} finished, {len(queued)} in the queue.")
        return 0
    for run in stopped:
        print(f"{run.path.name}: {run.state}, goes on from step {run.progress.saved}")
    if not dry_run:
        tasks = [run.task for run in stopped if run.task is not None]
        job_id = scheduler.submit(JobFolder(path), tasks, more)
        print(f"Submitted job {job_id}.")
    return 0


def print_csv(paths: Sequence[Path]) -> int:
    """A row for each run: where it stands, what it measured, and the settings that differ."""
    states = [run for path in paths for run in _of_path(path)]
    keys = list(dict.fromkeys(key for run in states for key in run.settings if key not in PLACES))
    differing = [key for key in keys if len({_cell(run.settings.get(key)) for run in states}) > 1]
    table = csv_format.writer(sys.stdout, lineterminator="\n")
    measured = list(asdict(Progress()))
    table.writerow(["run", "state", "steps", *measured, *differing, "path"])
    for run in states:
        values = asdict(run.progress)
        table.writerow(
            [
                *(run.path.name, run.state, run.steps),
                *(_cell(values[key]) for key in measured),
                *(_cell(run.settings.get(key)) for key in differing),
                run.path,
            ]
        )
    return 0


def _of_path(path: Path) -> Iterator[RunState]:
    job = JobFolder(path)
    if job.record.exists():
        yield from _of_job(job)
        return
    path = located(path)[0]
    if (path / "config.toml").is_file():
        yield RunState(
            path=path, settings=settings_of(path / "config.toml"), progress=progress(path)
        )
    else:
        raise ConfigError(f"{path} is neither a job's folder (job.json) nor a run's (config.toml).")


def _of_job(job: JobFolder, *, strict: bool = False) -> list[RunState]:
    record = job.read()
    known = _ask_slurm(sorted({s.job_id for s in record.submissions}), strict=strict)
    ids = _slurm_ids(job, record, known.queue)
    states = []
    for task in range(len(record.configs)):
        slurm_id = ids.get(task, "")
        run = job.run(task).readlink()
        written = run / "config.toml"
        states.append(
            RunState(
                path=run,
                settings=settings_of(written if written.is_file() else job.config(task)),
                progress=progress(run),
                task=task,
                slurm_id=slurm_id,
                queued=slurm_id in known.queue,
                slurm=known.queue.get(slurm_id) or known.ended.get(slurm_id, known.otherwise),
            )
        )
    return states


def _slurm_ids(
    job: JobFolder, record: Record, queue: Mapping[str, SlurmState]
) -> Mapping[int, str]:
    """What Slurm calls each task now: as it was submitted last, unless it is in the queue under
    another number, which sbatch did not tell or a user's own `sbatch job.sh` got.
    """
    ids = record.slurm_ids()
    for slurm_id, state in queue.items():
        if not state.is_in(job.path):
            continue
        number = slurm_id.rpartition("_")[2]
        # One that is no task of an array, or tells several at once, may be any of them.
        is_one = record.is_array and "_" in slurm_id and number.isdecimal()
        for task in [int(number)] if is_one else range(len(record.configs)):
            if ids.get(task) not in queue:
                ids[task] = slurm_id
    return ids


def _ask_slurm(jobs: Sequence[str], *, strict: bool) -> Known:
    try:
        queue = scheduler.queue()
    except RunError as error:
        if strict:
            raise
        print(f"Only the runs' folders are read: Slurm cannot be asked. {error}", file=sys.stderr)
        return Known(otherwise=UNKNOWN)
    try:
        return Known(queue=queue, ended=scheduler.ended(jobs))
    except RunError as error:
        print(f"How jobs ended is not known. {error}", file=sys.stderr)
        return Known(queue=queue)


def _number(value: float | None, format_: str) -> str:
    return "" if value is None else format(value, format_)


def _cell(value: object) -> str:
    """As it stands in a cell of CSV."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
