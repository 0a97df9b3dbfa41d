"""`picotron slurm` against stubs of Slurm's commands, which are real programs on the PATH."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from picotron_core.cli.slurm.script import array_word

NASTY = 'it\'s a "test" $HOME\\#1'  # of folders: all that a shell or sbatch might trip over
WAIT_S = 240  # a busy machine is no failure


@dataclass(frozen=True)
class Cluster:
    """Stubs that do what a file of the same name says, and write down what they were asked."""

    path: Path

    def stub(self, name: str, body: str) -> None:
        """A command that appends its arguments to `<name>.calls`, a JSON list a line."""
        text = (
            f"#!{sys.executable}\n"
            "import json, os, signal, subprocess, sys\n"
            f"with open({str(self.path / name) + '.calls'!r}, 'a') as file:\n"
            "    print(json.dumps(sys.argv[1:]), file=file)\n"
            f"{body}\n"
        )
        program = self.path / name
        program.write_text(text)
        program.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        path = self.path / f"{name}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch) -> Cluster:
    cluster = Cluster(tmp_path_factory.mktemp("bin"))
    cluster.stub("sbatch", "print('123')")
    cluster.stub("squeue", "")
    cluster.stub("sacct", "")
    monkeypatch.setenv("PATH", f"{cluster.path}:/usr/bin:/bin")
    return cluster


def write_config(folder: Path, name: str, text: str = "") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('[run]\ndevice = "cpu"\n' + text)
    return name


def directives(script: str) -> list[str]:
    """The words of the #SBATCH lines as sbatch's own parser reads them: a backslash keeps the next
    character, a double quote toggles, whitespace ends a word, # a line.
    """
    words = []
    for line in script.splitlines():
        if not line.startswith("#SBATCH"):
            continue
        word, quoted, escaped = "", False, False
        for character in line[len("#SBATCH") :] + " ":
            if escaped:
                word, escaped = word + character, False
            elif character == "\\":
                escaped = True
            elif character == '"':
                quoted = not quoted
            elif character == "#" and not quoted:
                break
            elif character.isspace() and not quoted:
                words += [word] if word else []
                word = ""
            else:
                word += character
    return words


def check_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_one_config_is_a_job_and_several_are_an_array(picotron, cluster, tmp_path):
    for name in ("a.toml", "b.toml", "c.toml"):
        write_config(tmp_path, name)
    code, out, err = picotron("slurm", "a.toml", "--ranks-per-node", "2", "--nodes", "2")
    assert (code, err) == (0, "")
    assert "Submitted job 123: a run of 2 x 2 ranks." in out
    assert "picotron slurm status slurm/a" in out
    check_syntax(tmp_path / "slurm" / "a" / "job.sh")
    words = directives((tmp_path / "slurm" / "a" / "job.sh").read_text())
    for word in ("--nodes=2", "--ntasks-per-node=2", "--ntasks=4", "--requeue"):
        assert word in words
    assert "--open-mode=append" in words
    assert not [word for word in words if word.startswith(("--array", "--gres"))]
    code, out, _ = picotron(
        *("slurm", "submit", "a.toml", "b.toml", "c.toml", "--job-name", "sweep"),
        *("--max-running", "2", "--gpus-per-node", "v100:4", "--run.device", "auto"),
        *("--no-requeue", "--cpus-per-task", "3", "--time", "1:00:00"),
    )
    assert code == 0
    assert "3 runs, each of 1 x 4 ranks, at most 2 at a time" in out
    script = (tmp_path / "slurm" / "sweep" / "job.sh").read_text()
    check_syntax(tmp_path / "slurm" / "sweep" / "job.sh")
    words = directives(script)
    for word in ("--array=0-2%2", "--gres=gpu:v100:4", "--no-requeue", "--time=1:00:00"):
        assert word in words
    assert words == cluster.calls("sbatch")[1][:-2]  # and the command line says the same
    assert "scontrol requeue" not in script
    assert "OMP_NUM_THREADS=3" in script
    names = [(tmp_path / "slurm" / "sweep" / "runs" / str(n)).readlink() for n in range(3)]
    assert names == [tmp_path / "runs" / name for name in ("a-2", "b", "c")]


def test_what_was_submitted_is_frozen(picotron, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PICOTRON_CACHE_DIR", "/from/environment")
    monkeypatch.setenv("PICOTRON_BACKENDS", "rope=naive-math")
    write_config(
        tmp_path, "a.toml", 'dir = "my runs"\n[train]\nlr = 0.5\n[backends]\nnorm = "naive-math"'
    )
    given = ("--", "--train.steps", "7", "--data.paths", "text")
    code, _, err = picotron("slurm", "a.toml", "--backends", "loss=naive-math", *given)
    assert (code, err) == (0, "")
    write_config(tmp_path, "a.toml", "[train]\nlr = 0.25")
    frozen = tomllib.loads((tmp_path / "slurm/a/configs/0.toml").read_text())
    assert (frozen["train"]["lr"], frozen["train"]["steps"]) == (0.5, 7)
    assert frozen["run"]["dir"] == str(tmp_path / "my runs")
    assert (frozen["run"]["name"], frozen["run"]["resume"]) == ("a", True)
    assert (frozen["data"]["cache_dir"], frozen["data"]["paths"]) == ("/from/environment", ["text"])
    assert frozen["backends"] == "norm=naive-math"
    script = (tmp_path / "slurm/a/job.sh").read_text()
    assert "--backends loss=naive-math" in script
    assert "export PICOTRON_BACKENDS=rope=naive-math" in script
    assert (tmp_path / "my runs" / "a").is_dir()  # the name is taken while the job waits
    monkeypatch.delenv("PICOTRON_CACHE_DIR")
    code, out, _ = picotron("config", "slurm/a/configs/0.toml")
    assert code == 0  # it is a config as any other
    assert "norm = naive-math  (file)" in out


def test_dry_run_prints_the_script_and_does_nothing(picotron, cluster, tmp_path, monkeypatch):
    write_config(tmp_path, "a.toml")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, out, err = picotron(
        *("slurm", "a.toml", "--dry-run", "--setup", "module load cuda", "--setup", "x=1"),
        *("--env", "NCCL_DEBUG=two words", "--partition", "old", "--account", "me", "--qos", "low"),
        *("--mem", "8G", "--sbatch-arg", "--constraint=v100", "--sbatch-arg", "--nice 3"),
    )
    assert code == 0
    assert "Nothing was written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]
    assert not cluster.calls("sbatch")
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    words = directives(out)
    for word in ("--partition=old", "--account=me", "--qos=low", "--mem=8G", "--constraint=v100"):
        assert word in words
    assert words[-2:] == ["--nice", "3"]
    assert "\nmodule load cuda\nx=1\n" in out
    assert "export NCCL_DEBUG='two words'" in out
    assert out.index("module load cuda") < out.index("set -uo pipefail")


def test_names_with_spaces_and_quotes(picotron, cluster, tmp_path, monkeypatch):
    folder = tmp_path / NASTY
    write_config(folder, "a.toml")
    picotron("--version")  # it goes into tmp_path
    monkeypatch.setattr("pathlib.Path.cwd", lambda: folder)
    code, _, err = picotron(
        *("slurm", f"{NASTY}/a.toml", "--job-name", "a \"b' #c", "--env", "X=it's"),
        *("--sbatch-arg", "--comment='of mine'"),
    )
    assert (code, err) == (0, "")
    script = folder / "slurm" / "a \"b' #c" / "job.sh"
    check_syntax(script)
    words = directives(script.read_text())
    assert words[0] == "--job-name=a \"b' #c"
    assert words[-1] == "--comment=of mine"
    assert words == cluster.calls("sbatch")[0][:-2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "3", "--parallel.tp", "2"), "a.toml: parallel.tp = 2: 2 ranks hold one copy"),
        (("--ranks-per-node", "3", "--parallel.tp", "3"), "parallel.tp = 3 does not divide"),
        (("--gpus-per-node", "2"), "run.device = 'cpu', but --gpus-per-node asks for GPUs"),
        (("--ranks-per-node", "2", "--run.device", "cuda"), "the job has no GPUs"),
        (("--ranks-per-node", "2", "--gpus-per-node", "2"), "give one of them"),
        (("--gpus-per-node", "many"), "give a number"),
        (("--train.stpes", "3"), "Did you mean 'train.steps'?"),
        (("--partiton", "x"), "No option --partiton. Did you mean 'partition'?"),
        (("--backends", "norm=navie-math"), "Did you mean 'naive-math'?"),
        (("--env", "PICOTRON_DEVICE=cpu"), "are read now"),
        (("--env", "A B=1"), "give NAME=VALUE"),
        (("--job-name", "a/b"), "must be a plain name"),
        (("--comment", "x"), "No option --comment"),
        (("--sbatch-arg", "--comment='a\nb'"), "must be one line"),
        (("b.toml",), "No config file b.toml"),
        (("a.toml",), "given twice"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    picotron, cluster, tmp_path, arguments, message
):
    write_config(tmp_path, "a.toml")
    code, _, err = picotron("slurm", "a.toml", *arguments)
    assert code == 2
    assert message in err
    assert not cluster.calls("sbatch")
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]


def test_a_misspelt_command_is_no_config(picotron, cluster):
    code, _, err = picotron("slurm", "statsu", "slurm/a")
    assert code == 2
    assert "status" in err


def test_a_number_is_found_among_the_words_of_a_wrapper(picotron, cluster, tmp_path):
    write_config(tmp_path, "a.toml")
    cluster.stub("sbatch", "print('Welcome, 3 of 4 nodes are up.\\n77;old')")
    code, out, _ = picotron("slurm", "a.toml")
    assert code == 0
    assert "Submitted job 77:" in out
    assert "--parsable" in cluster.calls("sbatch")[0]


def test_a_job_that_was_taken_keeps_its_folder(picotron, cluster, tmp_path):
    write_config(tmp_path, "a.toml")
    cluster.stub("sbatch", "print('Thank you!')")
    code, _, err = picotron("slurm", "a.toml")
    assert code == 1
    assert "took the job, but told no number" in err
    assert list(tmp_path.glob("slurm/*/job.sh"))


def test_without_sbatch_and_when_it_refuses(picotron, cluster, tmp_path, monkeypatch):
    write_config(tmp_path, "a.toml")
    cluster.stub("sbatch", "sys.exit('sbatch: error: invalid partition specified: old')")
    code, _, err = picotron("slurm", "a.toml")
    assert code == 1
    assert "sbatch: error: invalid partition specified: old" in err
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, _, err = picotron("slurm", "a.toml")
    assert code == 1
    assert "No sbatch here" in err
    assert "--dry-run" in err
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert left == []


def write_run(run: Path, *, steps: int, saved: bool = True, rate: float = 100.0) -> None:
    """What a run leaves behind after some steps."""
    lines = [
        {
            **{"step": step, "tokens": step * 10, "loss": 4.0 / step, "grad_norm": 1.0, "lr": 0.1},
            **{"tokens_per_s": rate * (step > 1), "step_s": 0.5, "mfu": None},
            "peak_memory_bytes": 1000 + step,
        }
        for step in range(1, steps + 1)
    ]
    evaluation = {"step": steps, "tokens": steps * 10, "val_loss": 2.5, "bits_per_byte": 1.25}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, evaluation])
    (run / "metrics.jsonl").write_text(text + '{"step": 9')  # it is writing the next
    if saved:
        (run / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)


@pytest.fixture
def sweep(picotron, cluster, tmp_path) -> Path:
    """Five runs of 8 steps: finished, running, waiting, timed out, never begun."""
    for number, name in enumerate("abcde"):
        write_config(tmp_path, f"{name}.toml", f"[train]\nsteps = 8\nlr = 0.{number + 1}\n")
    configs = [f"{name}.toml" for name in "abcde"]
    assert picotron("slurm", *configs, "--job-name", "sweep", "--max-running", "2")[0] == 0
    write_run(tmp_path / "runs" / "a", steps=8)
    write_run(tmp_path / "runs" / "b", steps=4)
    write_run(tmp_path / "runs" / "d", steps=3)
    queue = "123_1|RUNNING|None\n123_2|PENDING|Priority\n999_4|RUNNING|None"
    cluster.stub("squeue", f"print({queue!r})")
    past = "123_0|COMPLETED\n123_1|RUNNING\n123_3|TIMEOUT\n123_4|CANCELLED by 1000"
    cluster.stub("sacct", f"print({past!r})")
    return Path("slurm/sweep")


def test_status_of_every_run(picotron, cluster, sweep):
    code, out, err = picotron("slurm", "status", str(sweep))
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()[1:6]]
    assert [row[:5] for row in rows] == [
        ["0", "123_0", "a", "finished", "8/8"],
        ["1", "123_1", "b", "running", "4/8"],
        ["2", "123_2", "c", "pending", "0/8"],
        ["3", "123_3", "d", "timeout", "3/8"],
        ["4", "123_4", "e", "cancelled", "0/8"],
    ]
    assert rows[0][5:] == ["8", "0.5000", "2.5000", "100"]
    assert rows[2][-1] == "Priority"
    assert "picotron slurm resubmit slurm/sweep" in out
    assert f"--user={os.getuid()}" in cluster.calls("squeue")[0]


def test_status_without_slurm_reads_the_runs(picotron, cluster, sweep, monkeypatch):
    cluster.stub("sacct", "sys.exit('Slurm accounting storage is disabled')")
    _, out, err = picotron("slurm", "status", str(sweep))
    assert "accounting storage is disabled" in err
    assert [line.split()[3] for line in out.splitlines()[1:6]] == [
        *("finished", "running", "pending", "stopped", "stopped")
    ]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, out, err = picotron("slurm", "status", str(sweep))
    assert code == 0
    assert "No squeue here" in err
    states = [line.split()[3] for line in out.splitlines()[1:6]]
    assert states == ["finished", "unknown", "unknown", "unknown", "unknown"]
    assert "resubmit" not in out


def test_resubmit_takes_what_stopped_and_nothing_else(picotron, cluster, sweep, monkeypatch):
    code, out, _ = picotron("slurm", "resubmit", str(sweep), "--dry-run")
    assert code == 0
    assert len(cluster.calls("sbatch")) == 1
    cluster.stub("sbatch", "print('130;old')")
    code, out, _ = picotron("slurm", "resubmit", str(sweep), "--sbatch-arg", "--time 9:00")
    assert code == 0
    assert "d: timeout, goes on from step 3" in out
    first, second = cluster.calls("sbatch")
    assert "--array=0-4%2" in first
    assert second[-5:] == ["--time", "9:00", "--array=3-4%2", "--parsable", "job.sh"]
    assert second[:-5] == first[:-3]
    cluster.stub("squeue", "print('130_3|RUNNING|None\\n130_4|PENDING|None\\n123_1|RUNNING|None')")
    cluster.stub("sacct", "print('123_3|TIMEOUT\\n123_2|COMPLETED')")
    _, out, _ = picotron("slurm", "status", str(sweep))
    assert [line.split()[1] for line in out.splitlines()[1:6]] == [
        *("123_0", "123_1", "123_2", "130_3", "130_4")
    ]
    assert [line.split()[3] for line in out.splitlines()[1:6]] == [
        *("finished", "running", "stopped", "running", "pending")
    ]
    cluster.stub("squeue", "print('130_3|RUNNING|\\n130_4|PENDING|\\n123_1|RUNNING|\\n123_2|R|')")
    _, out, _ = picotron("slurm", "resubmit", str(sweep))
    assert "Nothing to submit: 1 finished, 4 in the queue." in out
    cluster.stub("squeue", "sys.exit('slurm_load_jobs error: Unable to contact controller')")
    code, _, err = picotron("slurm", "resubmit", str(sweep))
    assert code == 1  # two jobs in one folder would ruin the run: no guessing
    assert "Unable to contact controller" in err
    assert len(cluster.calls("sbatch")) == 2


def queued(cluster: Cluster, *lines: str) -> None:
    """What squeue tells: number|state|reason|directory."""
    cluster.stub("squeue", f"print({chr(10).join(lines)!r})")


def test_a_job_whose_number_was_not_told_is_found_in_the_queue_by_its_folder(
    picotron, cluster, tmp_path
):
    write_config(tmp_path, "a.toml")
    cluster.stub("sbatch", "print('Thank you!')")
    assert picotron("slurm", "a.toml")[0] == 1
    folder = tmp_path / "slurm" / "a"
    queued(cluster, "7|RUNNING|None|/elsewhere", f"500|PENDING|Priority|{folder}")
    _, out, _ = picotron("slurm", "status", "slurm/a")
    assert out.splitlines()[1].split() == ["0", "500", "a", "pending", "0/1000", "0", "Priority"]
    assert cluster.calls("squeue")[0][-1] == "--format=%i|%T|%r|%Z"
    code, out, _ = picotron("slurm", "resubmit", "slurm/a")
    assert code == 0
    assert "Nothing to submit: 0 finished, 1 in the queue." in out
    assert len(cluster.calls("sbatch")) == 1
    assert not cluster.calls("sacct")  # of no job, it would tell all of today's
    queued(cluster, f"7|RUNNING|None|{folder}-2", f"8|RUNNING|None|{tmp_path}", "9|RUNNING|None|")
    cluster.stub("sbatch", "print('501')")
    _, out, _ = picotron("slurm", "resubmit", "slurm/a")
    assert "Submitted job 501." in out  # it has left the queue, and others are none of its


def test_what_was_submitted_by_hand_is_not_submitted_again(picotron, cluster, sweep, tmp_path):
    folder = tmp_path / sweep
    link = tmp_path / "as Slurm | names it"
    link.symlink_to(folder, target_is_directory=True)
    queued(
        cluster,
        f"123_1|RUNNING|None|{folder}",
        f"600_1|PENDING|Resources|{folder}",  # a second of this task: the first is told
        f"600_3|PENDING|Priority|{link}",
        "601_2|RUNNING|None|/elsewhere",
    )
    _, out, _ = picotron("slurm", "status", str(sweep))
    assert [line.split()[1:4] for line in out.splitlines()[1:6]] == [
        *(["123_0", "a", "finished"], ["123_1", "b", "running"], ["123_2", "c", "stopped"]),
        *(["600_3", "d", "pending"], ["123_4", "e", "cancelled"]),
    ]
    picotron("slurm", "resubmit", str(sweep))
    assert "--array=2,4%2" in cluster.calls("sbatch")[1]


@pytest.mark.parametrize("number", ["600_[3-4%2]", "600", "600+1"])
def test_a_job_that_may_be_any_task_of_its_folder_keeps_all_from_the_queue(
    picotron, cluster, sweep, tmp_path, number
):
    queued(cluster, f"{number}|PENDING|None|{tmp_path / sweep}")
    _, out, _ = picotron("slurm", "resubmit", str(sweep))
    assert "Nothing to submit: 0 finished, 5 in the queue." in out
    assert len(cluster.calls("sbatch")) == 1


@pytest.mark.parametrize("argument", ["--chdir=/x", "-D /x", "-D/x", "--nice --workdir /x"])
def test_a_job_starts_in_its_own_folder(picotron, cluster, tmp_path, argument):
    write_config(tmp_path, "a.toml")
    code, _, err = picotron("slurm", "a.toml", "--sbatch-arg", argument)
    assert code == 2
    assert "a job starts in its own folder" in err
    assert not cluster.calls("sbatch")
    assert picotron("slurm", "a.toml")[0] == 0
    folder = str(tmp_path / "slurm" / "a")
    words = directives((tmp_path / "slurm" / "a" / "job.sh").read_text())
    for given in (words, cluster.calls("sbatch")[0]):
        assert given[given.index("-D") + 1] == folder
    cluster.stub("sbatch", f"print(1) if os.getcwd() == {folder!r} else None")
    code, _, err = picotron("slurm", "resubmit", "slurm/a", "--sbatch-arg", argument)
    assert code == 2
    assert picotron("slurm", "resubmit", "slurm/a")[0] == 0


def test_csv_has_a_row_for_each_run_and_the_settings_that_differ(
    picotron, cluster, sweep, tmp_path
):
    shutil.copytree(tmp_path / "runs" / "d", tmp_path / "alone")
    shutil.copy(tmp_path / sweep / "configs" / "3.toml", tmp_path / "alone" / "config.toml")
    code, out, err = picotron("slurm", "csv", str(sweep), "alone")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["run"] for row in rows] == ["a", "b", "c", "d", "e", "alone"]
    assert [row["state"] for row in rows] == [
        *("finished", "running", "pending", "timeout", "cancelled", "stopped")
    ]
    assert [row["train.lr"] for row in rows] == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.4"]
    differing = set(rows[0]) & {"train.steps", "train.seed", "run.name", "model.hidden_size"}
    assert not differing
    wanted = {"loss": "0.5", "val_loss": "2.5", "bits_per_byte": "1.25", "tokens": "80"}
    wanted |= {"tokens_per_s": "100.0", "step_s": "0.5", "mfu": "", "peak_memory_bytes": "1008"}
    assert {key: rows[0][key] for key in wanted} == wanted
    assert rows[2]["loss"] == ""
    code, _, err = picotron("slurm", "csv", "nowhere")
    assert code == 2
    assert "neither a job's folder" in err


def test_reading_runs_does_not_wait_for_torch(sweep, tmp_path):
    script = (
        "import sys\n"
        f"sys.argv = ['picotron', 'slurm', 'csv', {str(tmp_path / sweep)!r}]\n"
        "from picotron_core.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_arrays_of_some_tasks():
    assert array_word([0, 1, 2], 0) == "--array=0-2"
    assert array_word([1], 3) == "--array=1%3"
    assert array_word([0, 2, 3], 2) == "--array=0,2,3%2"


# Stubs of a job's own commands: two ranks on this machine, which hear what srun hears.
SRUN = """
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
ranks = []
for rank in "01":
    env = {**os.environ, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2"}
    ranks.append(subprocess.Popen(words, env=env))
signal.signal(signal.SIGUSR1, lambda number, _: [rank.send_signal(number) for rank in ranks])
sys.exit(max(rank.wait() if rank.wait() >= 0 else 128 - rank.wait() for rank in ranks))
"""
SCONTROL = "print('localhost\\nanother') if sys.argv[1] == 'show' else None"


@pytest.fixture
def start_job(cluster) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The batch script as slurmstepd starts it, in the job's folder; nobody outlives the test."""
    started = []

    def start(folder: Path, **variables: str) -> subprocess.Popen[str]:
        cluster.stub("srun", SRUN)
        cluster.stub("scontrol", SCONTROL)
        own = {"SLURM_JOB_ID": str(40000 + os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]"}
        job = subprocess.Popen(
            ["bash", "job.sh"],
            cwd=folder,
            env={**os.environ, **own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(job)
        return job

    yield start
    for job in started:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def wait_for(condition: Callable[[], object], job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_job_trains_on_two_ranks_and_goes_on_when_it_is_started_again(
    picotron, cluster, start_job, tiny, tmp_path
):
    steps = ("--train.steps", "100000", "--train.micro_batch", "2", "--train.eval_every", "0")
    write_config(tmp_path, "my run.toml", f"dir = {json.dumps(NASTY)}\n")
    code, _, err = picotron("slurm", "my run.toml", "--ranks-per-node", "2", *tiny, *steps)
    assert (code, err) == (0, "")
    folder, run = tmp_path / "slurm" / "my run", tmp_path / NASTY / "my run"
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 7}\n')  # of a start that was killed before it saved
    job = start_job(folder, PICOTRON_DEVICE="cuda")  # as another shell says: not for this job
    wait_for(lambda: metrics.read_text().count("loss") >= 3, job)
    job.send_signal(signal.SIGUSR1)  # the time limit is near
    out, _ = job.communicate(timeout=WAIT_S)
    assert job.returncode == 75, out
    assert "going on from nothing" in out
    number = str(40000 + os.getpid())
    assert ["requeue", number] in cluster.calls("scontrol")
    lines = metrics.read_text().splitlines()
    step = json.loads(lines[-1])["step"]
    assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()
    config = folder / "configs" / "0.toml"
    config.write_text(config.read_text().replace("steps = 100000", f"steps = {step + 2}"))
    job = start_job(folder)
    out, _ = job.communicate(timeout=WAIT_S)
    assert job.returncode == 0, out
    assert "resumed from" in out
    losses = [json.loads(line) for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert [line["step"] for line in losses] == list(range(1, step + 3))
    assert len([call for call in cluster.calls("scontrol") if call[0] == "requeue"]) == 1
    assert [path.name for path in (tmp_path / NASTY).iterdir()] == ["my run"]


RANK = """#!/bin/bash
# Stands in for Python: it saves where it is told to, and stops.
trap '[ -e saves ] && mkdir -p "$0.run/checkpoints/step-$RANK"; exit 75' USR1
touch "$0.up-$RANK-$WORLD_SIZE-$LOCAL_RANK-$MASTER_ADDR-$MASTER_PORT-$OMP_NUM_THREADS"
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("saves", [True, False])
def test_the_ranks_are_told_of_the_time_limit_and_go_on_in_a_new_job(
    picotron, cluster, start_job, tmp_path, saves
):
    python = tmp_path / NASTY / "python"
    python.parent.mkdir()
    python.write_text(RANK)
    python.chmod(0o755)
    if saves:
        (tmp_path / "saves").touch()
    for name in ("a.toml", "b.toml"):
        write_config(tmp_path, name)
    code, _, err = picotron("slurm", "a.toml", "b.toml", "--python", str(python))
    assert (code, err) == (0, "")
    folder = tmp_path / "slurm" / "picotron"
    link = folder / "runs" / "1"
    link.unlink()
    link.symlink_to(f"{python}.run")
    array = {"SLURM_ARRAY_JOB_ID": "20123", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "20125"}
    job = start_job(folder, **array)
    wait_for(lambda: len(list(python.parent.glob("python.up-*"))) == 2, job)
    assert {path.name for path in python.parent.glob("python.up-*")} == {
        *("python.up-0-2-0-localhost-10125-1", "python.up-1-2-1-localhost-10125-1")
    }
    job.send_signal(signal.SIGTERM)  # Slurm sends it to all: the script waits for the ranks
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=WAIT_S)
    assert job.returncode == 75, out
    requeued = [call for call in cluster.calls("scontrol") if call[0] == "requeue"]
    assert requeued == ([["requeue", "20123_1"]] if saves else [])
