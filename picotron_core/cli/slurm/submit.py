"""`picotron slurm CONFIG`: check, freeze, write the script, hand it to sbatch."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from picotron_core.cli.slurm import scheduler
from picotron_core.cli.slurm.folder import JobFolder, Record
from picotron_core.cli.slurm.freeze import backends_from, check, frozen
from picotron_core.cli.slurm.script import Batch, sbatch_lines, script
from picotron_core.config import Rule, Settings
from picotron_core.engine import run_directory
from picotron_core.errors import ConfigError, PicotronError
from picotron_core.files import make_link, new_folder, remove_empty, remove_tree, replace_text


def gpus_and_ranks(settings: Sequence[Settings], gpus: str, ranks: int) -> tuple[str, int]:
    """GPUs of a node as Slurm takes them, and ranks: one a GPU, or as many as were asked for.

    Raises: ConfigError where the two contradict each other.
    """
    if gpus and ranks:
        raise ConfigError(
            "--gpus-per-node starts a rank for each GPU, --ranks-per-node is for nodes without: "
            "give one of them."
        )
    if ranks:
        return "", ranks
    if not gpus and all(s.config.run.device == "cpu" for s in settings):
        return "", 1
    gpus = gpus or "1"
    number = gpus.rpartition(":")[2]
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--gpus-per-node {gpus!r}: give a number, or a kind and one: v100:4.")
    return gpus, int(number)


def variables(pairs: Sequence[str], rules: Sequence[Rule]) -> Mapping[str, str]:
    """The ranks' variables: `--env K=V` of the command line, and PICOTRON_BACKENDS as it is here,
    which cannot go into a config: it is weaker than `--backends`, and stronger than a file.

    Raises: ConfigError for what is no variable, and for Picotron's own.
    """
    said = backends_from("environment", rules)
    found = {"PICOTRON_BACKENDS": said} if said else {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"--env {pair!r}: give NAME=VALUE.")
        if name.startswith("PICOTRON_"):
            raise ConfigError(
                f"--env {name}: Picotron's variables are read now and frozen with the configs. "
                f"Set it for this command: {name}=... picotron slurm ..."
            )
        found[name] = value
    return found


def submit(batch: Batch, configs: Mapping[Path, Settings], *, dry_run: bool) -> int:
    """Submit a job; with `dry_run` write nothing and print its script.

    Args:
        configs: file -> its settings, one for each task.
    """
    words = [word for line in sbatch_lines(batch) for word in line]
    for word in words:
        if not word.isprintable():
            raise ConfigError(f"{word!r} cannot be an option of sbatch: it must be one line.")
    for path, settings in configs.items():
        try:
            check(settings, world_size=batch.world_size, gpus=bool(batch.gpus))
        except ConfigError as error:
            raise type(error)(f"{path}: {error}") from None
    if dry_run:
        print(script(batch), end="")
        print(f"Nothing was written. The job's folder would be {batch.folder}.", file=sys.stderr)
        return 0
    job = JobFolder(batch.folder)
    runs: list[Path] = []
    try:
        _write(job, batch, words, configs, runs)
        job_id = scheduler.submit(job, range(batch.tasks))
    except scheduler.NoNumberError:  # it will start, and needs what is here
        raise
    except PicotronError:  # nothing was submitted: leave nothing behind
        remove_tree(job.path)
        for run in runs:
            remove_empty(run)
        raise
    print(_told(batch, job, job_id, runs))
    return 0


def _write(
    job: JobFolder,
    batch: Batch,
    words: list[str],
    configs: Mapping[Path, Settings],
    runs: list[Path],
) -> None:
    """Everything in the job's folder; the runs' own folders are made, so that nobody takes their
    names while the job waits.
    """
    for folder in (job.path, job.logs, job.config(0).parent, job.run(0).parent):
        new_folder(folder)
    for task, (path, settings) in enumerate(configs.items()):
        wanted = settings.config.run
        parent = batch.directory / Path(wanted.dir).expanduser()
        runs.append(run_directory.create(parent, wanted.name or path.stem).path)
        replace_text(job.config(task), frozen(settings, runs[-1]))
        make_link(job.run(task), runs[-1])
    replace_text(job.script, script(batch))
    names = [str(path) for path in configs]
    job.write(Record(words=words, max_running=batch.max_running, configs=names))


def _told(batch: Batch, job: JobFolder, job_id: str, runs: Sequence[Path]) -> str:
    """What was submitted, and what to do next."""
    folder = shlex.quote(str(job.path.relative_to(batch.directory)))
    log = f"{job_id}_0.out" if batch.is_array else f"{job_id}.out"
    what = f"{batch.tasks} runs, each of" if batch.is_array else "a run of"
    limited = batch.is_array and batch.max_running
    limit = f", at most {batch.max_running} at a time" if limited else ""
    return "\n".join(
        [
            f"Submitted job {job_id}: {what} {batch.nodes} x {batch.ranks_per_node} ranks{limit}.",
            *(f"run     {run}" for run in runs),
            "",
            "Next:",
            f"  picotron slurm status {folder}",
            f"  tail -F {folder}/logs/{log}",
            f"  scancel {job_id}",
        ]
    )
