"""What Slurm's own commands are asked, and what they answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from picotron_core.cli.slurm.folder import JobFolder, Submission
from picotron_core.cli.slurm.script import array_word, words_of
from picotron_core.errors import RunError


@dataclass(frozen=True, slots=True)
class SlurmState:
    """state: Slurm's word, e.g. RUNNING, TIMEOUT. reason: why it waits, where it does. directory:
    where its script starts.
    """

    state: str
    reason: str = ""
    directory: str = ""

    def is_in(self, folder: Path) -> bool:
        """Whether it starts in a folder, under whatever name Slurm knows that by."""
        try:
            return os.path.samefile(folder, self.directory)
        except OSError:  # not told, or not here: on another machine, or removed
            return False


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
    words = [*record.words, *(word for line in more for word in words_of(line))]
    if record.is_array:
        words.append(array_word(tasks, record.max_running))
    answer = _run(["sbatch", *words, "--parsable", "job.sh"], cwd=job.path)
    # "123" or "123;cluster", among what a site's wrapper says
    found = re.search(r"^\s*(\d+)\s*(?:;.*)?$", answer, re.M)
    if not found:
        raise NoNumberError(
            f"sbatch took the job, but told no number. It said: {answer.strip()!r}. Find it by its "
            f"folder: picotron slurm status {job.path}"
        )
    submission = Submission(job_id=found.group(1), tasks=list(tasks))
    job.write(record.model_copy(update={"submissions": [*record.submissions, submission]}))
    return submission.job_id


def queue() -> dict[str, SlurmState]:
    """This user's jobs that wait or run, by "123" or "123_4"."""
    # The directory is last: it may hold any character. A squeue that knows no %Z leaves it out.
    whose = f"--user={os.getuid()}"
    answer = _run(["squeue", "--noheader", "--array", whose, "--format=%i|%T|%r|%Z"])
    rows = (line.strip().split("|", 3) for line in answer.splitlines() if line.count("|") >= 2)
    return {
        job: SlurmState(state, "" if reason == "None" else reason, *directory)
        for job, state, reason, *directory in rows
    }


def ended(jobs: Sequence[str]) -> dict[str, SlurmState]:
    """What became of jobs, as the accounting knows."""
    if not jobs:  # of none, sacct would tell all of today's
        return {}
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
