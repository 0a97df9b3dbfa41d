"""The folder of a job: `slurm/<name>/`, which says what was submitted and holds all that it reads.

job.sh              the script
configs/<task>.toml the configs, as they were
runs/<task>         links to the runs' folders
logs/               what the ranks print
job.json            sbatch's options, where the configs came from, and every submission
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from picotron_core.bounds import is_plain_name
from picotron_core.errors import ConfigError, DamagedFileError, reason
from picotron_core.files import replace_text


class Submission(BaseModel):
    """What sbatch accepted once: some of the job's tasks."""

    job_id: str
    tasks: list[int]


class Record(BaseModel):
    """job.json. words: sbatch's options but --array. configs: the files, one a task."""

    words: list[str]
    max_running: int
    configs: list[str]
    submissions: list[Submission] = []

    @property
    def is_array(self) -> bool:
        return len(self.configs) > 1

    def slurm_ids(self) -> dict[int, str]:
        """What Slurm calls each task now: "123", or "123_4" in an array."""
        return {
            task: f"{submission.job_id}_{task}" if self.is_array else submission.job_id
            for submission in self.submissions
            for task in submission.tasks
        }


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The paths of one job."""

    path: Path

    @property
    def script(self) -> Path:
        return self.path / "job.sh"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def record(self) -> Path:
        return self.path / "job.json"

    def config(self, task: int) -> Path:
        return self.path / "configs" / f"{task}.toml"

    def run(self, task: int) -> Path:
        return self.path / "runs" / str(task)

    def write(self, record: Record) -> None:
        replace_text(self.record, json.dumps(record.model_dump(), indent=1) + "\n")

    def read(self) -> Record:
        """Raises: ConfigError where no job was submitted from here."""
        try:
            return Record.model_validate(json.loads(self.record.read_bytes()))
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path} is no job's folder (no job.json). `ls slurm` shows what there is."
            ) from None
        except ValidationError as error:
            raise DamagedFileError(
                f"{self.record} is damaged ({error.errors()[0]['msg']})."
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedFileError(f"{self.record} is damaged ({reason(error)}).") from None


def free(parent: Path, name: str) -> Path:
    """`parent/name`, or `name-2` and so on where that exists.

    Raises: ConfigError for a name that is none of a folder.
    """
    if not is_plain_name(name):
        raise ConfigError(f"--job-name {name!r} must be a plain name: the job's folder has it too.")
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path
