"""What Slurm's own commands are asked, and what they answer."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from picotron_core.cli.slurm.folder import JobFolder, Submission
from picotron_core.cli.slurm.script import array_word
from picotron_core.errors import RunError


@dataclass(frozen=True, slots=True)
class SlurmState:
    """state: Slurm's word, e.g. RUNNING, TIMEOUT. reason: why it waits, where it does."""

    state: str
    reason: str = ""


class NoNumberError(RunError):
    """A job was submitted, and is known by its folder alone."""


def submit(job: JobFolder, tasks: Sequence[int], more: Sequence[str] = ()) -> str:
    """Have sbatch take some tasks of a job, and write it down -> Slurm's number.

    The options are in the script as well. They are given again here for a variable such as
    SBATCH_ACCOUNT beats the script, but not the command line.

    Args:
        more: options of sbatch for this time, which beat the job's own.
    """
    if not shutil.which("sbatch"):
        raise RunError(
            "No sbatch here: jobs are submitted from a login node of a Slurm cluster. "
            "--dry-run shows what would be submitted."
        )
    record = job.read()
    words = [*record.words, *(word for line in more for word in shlex.split(line))]
    if record.is_array:
        words.append(array_word(tasks, record.max_running))
    answer = _run(["sbatch", *words, "--parsable", "job.sh"], cwd=job.path)
    # "123" or "123;cluster", among what a site's wrapper says
    found = re.search(r"^\s*(\d+)\s*(?:;.*)?$", answer, re.M)
    if not found:
        raise NoNumberError(
            f"sbatch took the job, but told no number. It said: {answer.strip()!r}. Find it with "
            f"squeue: its folder is {job.path}."
        )
    submission = Submission(job_id=found.group(1), tasks=list(tasks))
    job.write(record.model_copy(update={"submissions": [*record.submissions, submission]}))
    return submission.job_id


def queue() -> dict[str, SlurmState]:
    """This user's jobs that wait or run, by "123" or "123_4"."""
    whose = f"--user={os.getuid()}"
    answer = _run(["squeue", "--noheader", "--array", whose, "--format=%i|%T|%r"])
    rows = (line.strip().split("|", 2) for line in answer.splitlines() if line.count("|") >= 2)
    return {
        job: SlurmState(state, "" if reason == "None" else reason) for job, state, reason in rows
    }


def ended(jobs: Sequence[str]) -> dict[str, SlurmState]:
    """What became of jobs, as the accounting knows."""
    answer = _run(
        [
            *("sacct", "--noheader", "--parsable2", "--allocations"),
            *(f"--jobs={','.join(jobs)}", "--format=JobID,State"),
        ]
    )
    rows = (line.split("|", 1) for line in answer.splitlines() if "|" in line)
    return {job: SlurmState(state.split()[0]) for job, state in rows if state.strip()}


def _run(words: Sequence[str], cwd: Path | None = None) -> str:
    command = words[0]
    if not shutil.which(command):
        raise RunError(f"No {command} here: ask on a login node of the cluster.")
    answer = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if answer.returncode:
        said = answer.stderr.strip() or answer.stdout.strip() or "nothing"
        raise RunError(f"{command} failed (exit code {answer.returncode}). It said: {said}")
    if answer.stderr.strip():  # a warning of the site's
        print(answer.stderr.strip(), file=sys.stderr)
    return answer.stdout
