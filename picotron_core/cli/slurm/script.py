"""The job as sbatch reads it: its options, and the script that starts the ranks.

Every rank is a task of Slurm's own, not of a torchrun on each node: a signal then reaches the ranks
themselves. torchrun dies of SIGUSR1, unless a newer one is told otherwise, and leaves its ranks
behind; after SIGTERM it kills them within 30 s, saved or not
(github.com/pytorch/pytorch/issues/154849, 119856).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from picotron_core.cli.stop import REQUEUE
from picotron_core.errors import ConfigError

WARNING_S = 180  # before the time limit: what a step and a save may take
SAVE_S = 600  # after the first rank's end: what another may need that still writes

SCRIPT = r"""

set -uo pipefail  # not before: `module` and conda read variables that are not set

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*}                   # rank 0 is on the first node
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # below those that Linux gives away itself

saved() { ls -d "$folder/runs/$task/checkpoints"/step-* 2> /dev/null | tail -n 1 || true; }
before=$(saved)
echo "job $job on ${nodes//$'\n'/ }, going on from ${before:-nothing}"

# A task is a rank; `exec` makes it the process that Slurm signals. A rank that ends is no reason to
# kill one that is still writing a checkpoint.
srun --label --export=ALL --distribution=block "${srun[@]}" \
    bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        exec "$@"' rank "${train[@]}" &
ranks=$!
trap '' TERM  # Slurm tells the ranks as well; they save, and this script waits for them
warned=
again=yes
trap 'warned=yes again=yes; kill -USR1 "$ranks" || true' USR1  # time is nearly up: srun tells all
while [ "$again" ]; do  # a signal ends `wait`, not the ranks
    again=
    code=0
    wait "$ranks" || code=$?
done
"""
REQUEUE_SCRIPT = f"""
# Stopped by the time limit: start again from what was saved, but not for ever if nothing is.
if [ "$warned" ] && [ "$code" -eq {REQUEUE} ] && [ "$(saved)" != "$before" ]; then
    scontrol requeue "$job"
fi
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A job, or an array of jobs that differ in their config.

    folder: the job's own. directory: where relative paths of the configs start.
    gpus: of a node, as Slurm takes them: "4", "v100:4"; "" for none.
    backends: what `--backends` said.
    """

    name: str
    folder: Path
    directory: Path
    tasks: int
    nodes: int
    ranks_per_node: int
    gpus: str
    python: str
    max_running: int = 0
    cpus_per_task: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    mem: str = ""
    requeue: bool = True
    setup: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    sbatch: Sequence[str] = ()
    backends: str = ""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def is_array(self) -> bool:
        return self.tasks > 1


def sbatch_lines(batch: Batch) -> list[list[str]]:
    """sbatch's options but --array, line by line; a later one wins, so the user's own are last."""
    given = {
        "job-name": batch.name,
        "nodes": batch.nodes,
        "ntasks-per-node": batch.ranks_per_node,
        "ntasks": batch.world_size,  # without it some versions leave SLURM_NTASKS unset
        "gres": batch.gpus and f"gpu:{batch.gpus}",
        "cpus-per-task": batch.cpus_per_task,
        "mem": batch.mem,
        "time": batch.time,
        "partition": batch.partition,
        "account": batch.account,
        "qos": batch.qos,
        # Relative to the job's folder: in this option % and \ have a meaning of their own.
        "output": "logs/%A_%a.out" if batch.is_array else "logs/%j.out",
        "open-mode": "append",  # a start after the first must not wipe the log
        "signal": f"B:USR1@{WARNING_S}",
    }
    lines = [[f"--{option}={value}"] for option, value in given.items() if value]
    # Wherever it is submitted from: by this it is found in the queue. The long name of -D has
    # changed, from --workdir to --chdir.
    lines.append(["-D", str(batch.folder)])
    lines.append(["--requeue" if batch.requeue else "--no-requeue"])
    return lines + [words_of(line) for line in batch.sbatch]


def words_of(line: str) -> list[str]:
    """The words of a --sbatch-arg.

    Raises: ConfigError for another directory than the job's folder, by which it is known.
    """
    words = shlex.split(line)
    for word in words:
        if word.startswith(("-D", "--chd", "--workd")):
            raise ConfigError(
                f"--sbatch-arg {word}: a job starts in its own folder, by which it is found in the "
                "queue. Leave it out: its paths are those of where you call `picotron slurm`."
            )
    return words


def array_word(tasks: Sequence[int], max_running: int) -> str:
    """--array for some tasks: a range where they are one."""
    first, last = tasks[0], tasks[-1]
    is_range = list(tasks) == list(range(first, last + 1)) and first != last
    listed = f"{first}-{last}" if is_range else ",".join(map(str, tasks))
    return f"--array={listed}" + (f"%{max_running}" if max_running else "")


def script(batch: Batch) -> str:
    """The batch script, whole: it can be submitted by hand."""
    options = sbatch_lines(batch)
    if batch.is_array:
        options.append([array_word(range(batch.tasks), batch.max_running)])
    head = ["#!/bin/bash", *(f"#SBATCH {' '.join(map(_escaped, line))}" for line in options)]
    head += [
        "# Written by `picotron slurm`. To submit it by hand: sbatch job.sh",
        "",
        "set -e",
        f"folder={shlex.quote(str(batch.folder))}",
        f"cd {shlex.quote(str(batch.directory))}",
    ]
    if batch.is_array:
        head += ["task=$SLURM_ARRAY_TASK_ID", "job=${SLURM_ARRAY_JOB_ID}_$task"]
    else:
        head += ["task=0", "job=$SLURM_JOB_ID"]
    head += [
        *batch.setup,
        'unset "${!PICOTRON_@}"  # what they said is in the configs',
        f"export OMP_NUM_THREADS={batch.cpus_per_task or 1} PYTHONUNBUFFERED=1",
    ]
    head += [f"export {name}={shlex.quote(value)}" for name, value in batch.env.items()]
    # srun takes --cpus-per-task from sbatch no longer, since Slurm 22.05.
    srun = ["--kill-on-bad-exit=0", f"--wait={SAVE_S}"]
    srun += [f"--cpus-per-task={batch.cpus_per_task}"] if batch.cpus_per_task else []
    train = f'{shlex.quote(batch.python)} -m picotron_core.cli train "$folder/configs/$task.toml"'
    if batch.backends:
        train += f" --backends {shlex.quote(batch.backends)}"
    head += [f"srun=({' '.join(srun)})", f"train=({train})"]
    return "\n".join(head) + SCRIPT + (REQUEUE_SCRIPT if batch.requeue else "") + 'exit "$code"\n'


def _escaped(word: str) -> str:
    r"""A word as sbatch reads it in a line. What quotes mean there has changed, \ has not."""
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", word)
